// Calls of the API: keys, errors as one sentence, and waiting while the service is full.

const ROOT = new URL('../v1/', import.meta.url);
const KEY = 'mixer-key';
const TRIES = 6;

/** Why there is no reply: `message` is one sentence for people, `status` is 0 where nothing answered. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = '', requestId = '', retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId, retryAfter });
  }
}

export const key = () => sessionStorage.getItem(KEY);

export const imageUrl = (id) => new URL(`items/${encodeURIComponent(id)}/image`, ROOT);

let askForKey = async () => null;
let asking = null;

/** Say who is asked for a key: `ask(sentence)` returns a promise of the key, or of null. */
export function onMissingKey(ask) {
  askForKey = ask;
}

/** Return `{body, ms}`, the JSON reply and how long it took. `waiting(seconds)` is told while the service is full. */
export async function call(path, init = {}, waiting = null) {
  for (let tried = 1; ; tried += 1) {
    const sent = performance.now();
    const reply = await send(path, init);
    const body = await reply.json().catch(() => null);
    if (reply.ok && body) return { body, ms: performance.now() - sent };
    const error = failure(reply, body);
    if (error.status === 401 && await renewKey(error.message)) continue;
    if (!waiting || error.retryAfter === null || tried === TRIES) throw error;
    await wait(error.retryAfter, waiting, init.signal);
  }
}

/** Return the bytes of an item's picture, or null if it has none. Waits where a key may not ask so often. */
export async function picture(id) {
  for (let tried = 1; ; tried += 1) {
    const reply = await send(imageUrl(id), {});
    if (reply.ok) return reply.blob();
    const { retryAfter } = failure(reply, null);
    if (retryAfter === null || tried === TRIES) return null;
    await wait(retryAfter);
  }
}

async function send(path, init) {
  const headers = new Headers(init.headers);
  if (key()) headers.set('Authorization', `Bearer ${key()}`);
  try {
    return await fetch(new URL(path, ROOT), { ...init, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError('The service cannot be reached; check the connection and try again.');
  }
}

function failure(reply, body) {
  const said = body?.error ?? {};
  const message = said.message ? sentence(said.message) : `The service answered with status ${reply.status}.`;
  const after = Number(reply.headers.get('Retry-After') ?? NaN);
  return new ApiError(message, {
    status: reply.status,
    code: said.code ?? '',
    requestId: said.request_id ?? reply.headers.get('X-Request-ID') ?? '',
    retryAfter: [429, 503].includes(reply.status) && Number.isFinite(after) ? after : null,
  });
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? '' : '.'}`;
}

async function renewKey(why) {
  // Calls that run at the same time share one question.
  asking ??= askForKey(why).finally(() => { asking = null; });
  const given = await asking;
  if (given) sessionStorage.setItem(KEY, given);
  else sessionStorage.removeItem(KEY);
  return Boolean(given);
}

async function wait(seconds, waiting = () => {}, signal = null) {
  for (let left = Math.max(1, Math.ceil(seconds)); left > 0; left -= 1) {
    waiting(left);
    await new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, 1000);
      signal?.addEventListener('abort', () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
    });
  }
}
