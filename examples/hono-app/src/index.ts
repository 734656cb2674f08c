import { Hono } from 'hono'
import { HTTPException } from 'hono/http-exception'
import { requestId } from 'hono/request-id'
import { bookRoutes } from './books.ts'

const app = new Hono()

app.use(requestId())
app.use(async (c, next) => {
  const began = performance.now()
  await next()
  c.header('Server-Timing', `app;dur=${(performance.now() - began).toFixed(1)}`)
  console.log(`${c.req.method} ${c.req.path} ${c.res.status}`)
})

app.get('/', (c) => c.text('books live at /books\n'))
app.route('/books', bookRoutes)

app.notFound((c) => c.json({ error: `there is no ${c.req.path}` }, 404))
app.onError((error, c) => {
  if (error instanceof HTTPException) return error.getResponse()
  console.error(error)
  return c.json({ error: 'something broke' }, 500)
})

export default app
