/** What the operations of the OpenAPI document have in common. */
import { z } from 'zod'
import { problems } from '../shared/errors.ts'

const ProblemBody = z
  .object({
    type: z.string(),
    title: z.string(),
    status: z.int(),
    code: z.enum(Object.keys(problems) as [keyof typeof problems]),
    detail: z.string(),
    field: z.string().optional(),
    errors: z
      .array(
        z.object({
          field: z.string().optional(),
          detail: z.string(),
          file: z.string().nullish(),
          line: z.int().nullish(),
          column: z.int().nullish(),
        }),
      )
      .optional(),
  })
  .meta({ id: 'Problem', description: 'RFC 9457' })

export const json = (schema: z.ZodType) => ({ 'application/json': { schema } })
/** Of the request’s own span: by it a request is found among the traces. */
const tracedBy = z.object({ traceparent: z.string() })
export const problem = (description: string) => ({
  description,
  headers: tracedBy,
  content: { 'application/problem+json': { schema: ProblemBody } },
})
export const answers = (description: string, schema: z.ZodType) => ({ description, content: json(schema) })

/** The same for what makes or ends a workload. */
export const tracedAnswers = (description: string, schema: z.ZodType) => ({
  ...answers(description, schema),
  headers: tracedBy,
})

export const runHeaders = z.object({
  prefer: z.string().optional().meta({ description: '`wait=<seconds>` or `respond-async`' }),
  'idempotency-key': z.string().min(1).max(255).optional(),
  traceparent: z.string().optional(),
})
export const unavailable = problem('The bus or the database cannot be reached; see Retry-After')
