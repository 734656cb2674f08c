CREATE TABLE `told` (
	`stream` text PRIMARY KEY NOT NULL,
	`seq` integer NOT NULL
);
