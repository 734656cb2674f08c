interface Input {
  name?: string
  language?: 'en' | 'de' | 'fr'
}

const words = { en: 'hello', de: 'hallo', fr: 'bonjour' } as const

/** Called with the JSON that was posted; what it returns is the output. */
export default function hello({ name = 'world', language = 'en' }: Input = {}) {
  console.log(`greeting ${name}`)
  return { greeting: `${words[language]}, ${name}` }
}
