ALTER TABLE `workloads` ADD `source_blob` text;--> statement-breakpoint
CREATE INDEX `workloads_source_blob` ON `workloads` (`source_blob`) WHERE "workloads"."source_blob" is not null;