// What a user writes first: the official SDK, a batch of 100 locked rows at a time,
// all 100 in flight, each row updated when its answer comes.  Reference of the bench.
//
//	node sdk.mjs URL		the database is in PGHOST and so on
import pg from 'pg';
import Sent from '@sentdm/sentdm';
import { serve } from './serve.mjs';

const BATCH = 100;
const client = new Sent({ apiKey: 'sk_test_of_the_bench', baseURL: process.argv[2] });
const db = new pg.Client();
await db.connect();

async function send(row) {
  try {
    const answer = await client.messages.send({
      to: [row.recipient],
      template: { name: row.template, parameters: row.parameters },
      'Idempotency-Key': `node-${row.id}`,
    });
    await db.query(
      "UPDATE node.messages SET state = 'accepted', sent_id = $2, finished_at = now() WHERE id = $1",
      [row.id, answer.data.recipients[0].message_id]);
  } catch (error) {
    await db.query(
      "UPDATE node.messages SET state = 'failed', error = $2, finished_at = now() WHERE id = $1",
      [row.id, String(error)]);
  }
}

async function sendBatch() {
  await db.query('BEGIN');
  const { rows } = await db.query(
    `SELECT id, recipient, template, parameters FROM node.messages
     WHERE state = 'queued' ORDER BY id LIMIT ${BATCH} FOR UPDATE SKIP LOCKED`);
  await Promise.all(rows.map(send));
  await db.query('COMMIT');
  return rows.length;
}

await serve(async () => {
  let sent = 0;
  for (let n; (n = await sendBatch()) > 0;)
    sent += n;
  return sent;
});
