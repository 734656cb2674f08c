import { z } from 'zod'

const Order = z.strictObject({
  customer: z.email(),
  lines: z
    .array(
      z.strictObject({
        sku: z.string().min(1),
        quantity: z.int().positive(),
        price: z.number().nonnegative(),
      }),
    )
    .min(1),
})

/** Answers with the total, or with everything that is wrong with the order and where. */
export default function total(input: unknown) {
  const order = Order.safeParse(input)
  if (!order.success)
    return {
      accepted: false,
      errors: order.error.issues.map(({ path, message }) => ({ field: path.join('.'), message })),
    }
  const cents = order.data.lines.reduce((sum, line) => sum + Math.round(line.price * 100) * line.quantity, 0)
  return { accepted: true, customer: order.data.customer, total: cents / 100 }
}
