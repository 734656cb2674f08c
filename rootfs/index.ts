/** What runners need of the machines' parts: finds or makes them from what is on this machine, and fetches nothing. */
export { type DriveImage, driveOf, type RootFormat, writeJobDrive } from './drives.ts'
export { ErofsError, type ErofsSource } from './erofs.ts'
export { fetchedFirecracker } from './firecracker.ts'
export { findMachineParts, type KernelFormat, type MachineParts } from './parts.ts'
