/** Keeps the values of secrets out of what leaves the sandbox as text: log lines and error messages. */

/** Shorter values (UTF-16 units) would take half of every text with them. */
const shortest = 4
/** A single line of a value of several is hidden from this length on. */
const shortestLine = 8

/** Texts from this length on (UTF-16 units) may have been cut in the sandbox, and a value with them. */
const mayBeCut = 15_000
/** What the sandbox writes behind a line that it cut. */
const cutMark = /(?: … \[line cut: it had \d+ bytes\])?$/

export type Redact = (text: string) => string

/**
 * Replaces each value, as it is and as it stands in JSON, by `[redacted: NAME]`; of a value of several lines also
 * each line. Undefined where there is nothing to hide. The cost is one search of the text per value.
 */
export function redactor(secrets: Record<string, string>): Redact | undefined {
  const hidden = new Map<string, string>()
  for (const [name, value] of Object.entries(secrets)) {
    const word = `[redacted: ${name}]`
    const inJson = JSON.stringify(value).slice(1, -1)
    const lines = value.includes('\n') ? value.split(/\r?\n/) : []
    for (const form of [value, inJson]) if (form.length >= shortest) hidden.set(form, word)
    for (const line of lines) if (line.trim().length >= shortestLine) hidden.set(line.trim(), word)
  }
  // A value that contains another goes first, or its rest would stay.
  const forms = [...hidden].sort(([a], [b]) => b.length - a.length)
  if (forms.length === 0) return undefined
  return (text) => {
    for (const [form, word] of forms) if (text.includes(form)) text = text.replaceAll(form, () => word)
    return text.length < mayBeCut ? text : withoutBeginning(text, forms)
  }
}

/** Without the beginning of a value that a cut left at the end. */
function withoutBeginning(text: string, forms: [form: string, word: string][]): string {
  const end = cutMark.exec(text)!.index
  for (const [form, word] of forms)
    for (let kept = Math.min(form.length - 1, end); kept >= shortest; kept--)
      if (text.startsWith(form.slice(0, kept), end - kept))
        return text.slice(0, end - kept) + word + text.slice(end)
  return text
}
