/** What this Node needs of the host beside its own binary, for whoever starts it where there is nothing else. */
import { existsSync } from 'node:fs'

/** Paths of the shared libraries that this Node has loaded: what the same Node in a child needs, and no more. */
export function sharedLibraries(): string[] {
  // A look at every network interface would make the report slow. The types do not know the property yet.
  Object.assign(process.report, { excludeNetwork: true })
  const report = process.report.getReport() as { sharedObjects?: string[] }
  return (report.sharedObjects ?? []).filter(
    (path) => path.startsWith('/') && !path.endsWith('.node') && existsSync(path),
  )
}
