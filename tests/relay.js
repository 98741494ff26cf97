// A Cloudflare Worker between VAPI's server URL and RunPod: VAPI cannot wrap its body in {"input": …}.
// Its variables: VAPI_SECRET, RUNPOD_API_KEY, RUNPOD_URL (https://api.runpod.ai/v2/<endpoint>).
const LOG_ENDED_CALLS = false; // true: end-of-call-report is a job too, for its line in the worker's log

// What wants an answer. All else, and what VAPI may add, only tells: the worker would say {} too, but in
// a job, which can cost a cold start. A type that you teach the worker to answer must be here as well.
const ASKS = [
  "assistant-request", "tool-calls", "function-call", "transfer-destination-request",
  "handoff-destination-request", "knowledge-base-request", "call.endpointing.request",
  "campaign.predial", "voice-request",
];
if (LOG_ENDED_CALLS) ASKS.push("end-of-call-report");

export default {
  async fetch(request, env) {
    if (request.headers.get("X-Vapi-Secret") !== env.VAPI_SECRET) {
      return new Response("wrong X-Vapi-Secret", { status: 401 });
    }
    const body = await request.json().catch(() => null);
    const type = body?.message?.type;
    if (!type) return new Response("not a message of VAPI", { status: 400 });
    if (!ASKS.includes(type)) return Response.json({});
    const ms = type === "assistant-request" ? 7000 : 19000; // VAPI waits 7.5 s and 20 s
    try { // VAPI speaks an "error" to the caller: no URL, no key, nothing long
      const answer = await fetch(`${env.RUNPOD_URL}/runsync?wait=${ms - 500}`, {
        method: "POST",
        headers: { Authorization: `Bearer ${env.RUNPOD_API_KEY}`, "Content-Type": "application/json" },
        body: JSON.stringify({ input: { type: "vapi_webhook", webhook_data: body } }),
        signal: AbortSignal.timeout(ms),
      });
      if (!answer.ok) return Response.json({ error: `RunPod: ${answer.status}` });
      const { status, output, error } = await answer.json();
      const [done] = [output].flat(); // a list where it streams
      return Response.json(done?.vapi_response ?? { error: error ?? `RunPod: the job is ${status}` });
    } catch (error) {
      const words = { TimeoutError: "no answer in time", SyntaxError: "its answer is not JSON" };
      return Response.json({ error: `RunPod: ${words[error.name] ?? "no connection"}` });
    }
  },
};
