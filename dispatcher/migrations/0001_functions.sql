ALTER TABLE `workloads` ADD `request_blob` text;--> statement-breakpoint
ALTER TABLE `workloads` ADD `response_blob` text;--> statement-breakpoint
ALTER TABLE `workloads` ADD `response` text;--> statement-breakpoint
CREATE INDEX `workloads_request_blob` ON `workloads` (`request_blob`) WHERE "workloads"."request_blob" is not null;--> statement-breakpoint
CREATE INDEX `workloads_response_blob` ON `workloads` (`response_blob`) WHERE "workloads"."response_blob" is not null;