// What the page says beside its results: a notice to see, and an announcement to hear.

import { by, make } from './dom.js';

/** Show a notice; `actions` are pairs of a label and a function. */
export function notice(kind, text, { actions = [], requestId = '' } = {}) {
  const place = by('notice');
  if (kind === 'waiting' && place.dataset.kind === kind && !place.hidden) {
    place.firstChild.textContent = text; // a countdown: its button keeps the focus, and nobody hears each second
    return;
  }
  const request = make('p', { className: 'request' }, 'Request ', make('code', { textContent: requestId }));
  place.dataset.kind = kind;
  place.replaceChildren(make('p', { textContent: text }), ...(requestId ? [request] : []), ...actions.map(button));
  place.hidden = false;
}

/** Take the notice away. */
export function noNotice() {
  by('notice').hidden = true;
}

/** Have a screen reader say `text`. */
export function announce(text) {
  by('announce').textContent = text;
}

function button([label, act]) {
  const made = make('button', { type: 'button', textContent: label });
  made.addEventListener('click', act);
  return made;
}
