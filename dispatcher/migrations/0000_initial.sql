CREATE TABLE `checkpoints` (
	`stream` text PRIMARY KEY NOT NULL,
	`seq` integer NOT NULL,
	`at` integer NOT NULL,
	`created` text NOT NULL
);
--> statement-breakpoint
CREATE TABLE `counters` (
	`name` text PRIMARY KEY NOT NULL,
	`value` integer NOT NULL,
	`last_seq` integer NOT NULL
);
--> statement-breakpoint
CREATE TABLE `log_batches` (
	`seq` integer PRIMARY KEY NOT NULL,
	`workload` text NOT NULL,
	`attempt` integer NOT NULL,
	`n` integer NOT NULL,
	`missing` integer NOT NULL,
	`line_count` integer NOT NULL,
	`bytes` integer NOT NULL,
	`dropped` integer NOT NULL,
	`dropped_by_runner` integer NOT NULL,
	`at` integer NOT NULL,
	`lines` text NOT NULL
);
--> statement-breakpoint
CREATE INDEX `log_batches_workload` ON `log_batches` (`workload`);--> statement-breakpoint
CREATE TABLE `workload_labels` (
	`accepted_seq` integer NOT NULL,
	`name` text NOT NULL,
	`value` text NOT NULL,
	PRIMARY KEY(`accepted_seq`, `name`)
);
--> statement-breakpoint
CREATE INDEX `workload_labels_value` ON `workload_labels` (`name`,`value`,`accepted_seq`);--> statement-breakpoint
CREATE INDEX `workload_labels_name` ON `workload_labels` (`name`,`accepted_seq`);--> statement-breakpoint
CREATE TABLE `workloads` (
	`accepted_seq` integer PRIMARY KEY NOT NULL,
	`id` text NOT NULL,
	`status` text NOT NULL,
	`isolation` text NOT NULL,
	`last_seq` integer NOT NULL,
	`created_at` text NOT NULL,
	`ended_at` text,
	`queue_ms` real,
	`duration_ms` real,
	`runner` text,
	`function` text,
	`payload_blob` text,
	`output_blob` text,
	`record` text NOT NULL,
	`output` text,
	`spec` text NOT NULL
);
--> statement-breakpoint
CREATE UNIQUE INDEX `workloads_id_unique` ON `workloads` (`id`);--> statement-breakpoint
CREATE INDEX `workloads_status` ON `workloads` (`status`);--> statement-breakpoint
CREATE INDEX `workloads_isolation` ON `workloads` (`isolation`);--> statement-breakpoint
CREATE INDEX `workloads_isolation_status` ON `workloads` (`isolation`,`status`);--> statement-breakpoint
CREATE INDEX `workloads_function` ON `workloads` (`function`) WHERE "workloads"."function" is not null;--> statement-breakpoint
CREATE INDEX `workloads_created_at` ON `workloads` (`created_at`);--> statement-breakpoint
CREATE INDEX `workloads_ended_at` ON `workloads` (`ended_at`) WHERE "workloads"."ended_at" is not null;--> statement-breakpoint
CREATE INDEX `workloads_payload_blob` ON `workloads` (`payload_blob`) WHERE "workloads"."payload_blob" is not null;--> statement-breakpoint
CREATE INDEX `workloads_output_blob` ON `workloads` (`output_blob`) WHERE "workloads"."output_blob" is not null;