// A Cloudflare Worker between VAPI's server URL and the endpoint: VAPI cannot wrap its body in {"input": …}.
// Its variables: VAPI_SECRET, RUNPOD_API_KEY, RUNPOD_URL (https://api.runpod.ai/v2/<endpoint>).
export default {
  async fetch(request, env) {
    if (request.headers.get("X-Vapi-Secret") !== env.VAPI_SECRET) {
      return new Response("wrong X-Vapi-Secret", { status: 401 });
    }
    try {
      const body = await request.json();
      const seconds = body.message?.type === "assistant-request" ? 7 : 19; // VAPI waits 7.5 s and 20 s
      const answer = await fetch(`${env.RUNPOD_URL}/runsync`, {
        method: "POST",
        headers: { Authorization: `Bearer ${env.RUNPOD_API_KEY}`, "Content-Type": "application/json" },
        body: JSON.stringify({ input: { type: "vapi_webhook", webhook_data: body } }),
        signal: AbortSignal.timeout(seconds * 1000),
      });
      const job = await answer.json();
      const output = Array.isArray(job.output) ? job.output[0] : job.output; // a list where it streams
      return Response.json(output?.vapi_response ?? { error: job.error ?? `RunPod: ${answer.status} ${job.status}` });
    } catch (error) {
      return Response.json({ error: `No answer in time: ${error.name}.` });
    }
  },
};
