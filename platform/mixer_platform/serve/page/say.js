// What the page says beside its results: a notice to see, an announcement to hear, a question for a key.

import { key } from './api.js';
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

/** Ask for a key; `why` is said where one was refused. Returns a promise of the key, or of null. */
export function askForKey(why) {
  const dialog = by('key-dialog');
  by('key-why').textContent = key() ? why : 'Whoever runs it can give you one.';
  by('key').value = '';
  dialog.returnValue = '';
  dialog.showModal();
  return new Promise((resolve) => {
    const answer = () => resolve(dialog.returnValue ? by('key').value.trim() : null);
    dialog.addEventListener('close', answer, { once: true });
  });
}

function button([label, act]) {
  const made = make('button', { type: 'button', textContent: label });
  made.addEventListener('click', act);
  return made;
}
