/** What every group of the bundle finds in scope: see `install.ts`. */
declare const host: import('./host.ts').Host
declare const group: import('./host.ts').Group
