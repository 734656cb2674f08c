import { Hono } from 'hono'
import { bodyLimit } from 'hono/body-limit'
import { cors } from 'hono/cors'

interface Book {
  id: string
  title: string
}

/** A sandbox may be replaced at any time: this is a stand-in for a store. */
const books = new Map<string, Book>([
  ['1', { id: '1', title: 'The Left Hand of Darkness' }],
  ['2', { id: '2', title: 'Invisible Cities' }],
])

export const bookRoutes = new Hono()

bookRoutes.use(cors())
bookRoutes.get('/', (c) => {
  const word = c.req.query('q')?.toLowerCase() ?? ''
  return c.json([...books.values()].filter(({ title }) => title.toLowerCase().includes(word)))
})
bookRoutes.get('/:id', (c) => {
  const book = books.get(c.req.param('id'))
  return book === undefined ? c.json({ error: 'no such book' }, 404) : c.json(book)
})
bookRoutes.post('/', bodyLimit({ maxSize: 10_000 }), async (c) => {
  const { title } = await c.req.json<{ title?: unknown }>()
  if (typeof title !== 'string' || title === '') return c.json({ error: 'title is required' }, 422)
  const book = { id: crypto.randomUUID(), title }
  books.set(book.id, book)
  return c.json(book, 201)
})
