// What the two workers share with the bench: for each line of standard input, drain
// the queue until it is empty and print what it cost, as one line of JSON.  The
// process stays, so that what is measured is warm.
import readline from 'node:readline';

export async function serve(drain) {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const began = process.hrtime.bigint();
    const cpu = process.cpuUsage();
    const sent = await drain();
    const used = process.cpuUsage(cpu);
    console.log(JSON.stringify({
      sent,
      seconds: Number(process.hrtime.bigint() - began) / 1e9,
      cpu_s: (used.user + used.system) / 1e6,
    }));
  }
  process.exit(0);
}
