// What a reply looks like: cards, and where the time went.

import { imageUrl, key, picture } from './api.js';
import { make, words } from './dom.js';

const AT_ONCE = 3; // attributes shown before "more"
const SHORT = 24; // characters; longer texts come last

/** Return the list entry of an item; "More like this" calls `alike(item)`. */
export function card(item, alike) {
  const name = item.title ?? item.id;
  const button = make('button', { type: 'button', className: 'quiet', textContent: 'More like this' });
  button.setAttribute('aria-label', `More like this: ${name}`);
  button.addEventListener('click', () => alike(item));
  const title = make('h3', { textContent: name });
  return make('li', { className: 'card', dataset: { id: item.id } },
    make('div', { className: 'picture' }, thumbnail(item)), title, score(item), ...attributes(item.attributes), button);
}

/** Return a card's place while the service works. */
export const blank = () => make('li', { className: 'card blank' }, make('div', { className: 'picture' }));

/** Show an item's picture in `img`, when it comes into view; `none()` is called if it has none. */
export function showPicture(img, id, none) {
  img.addEventListener('error', none, { once: true });
  if (!key()) {
    img.loading = 'lazy';
    img.src = imageUrl(id);
    return;
  }
  whenSeen(img, async () => {
    const blob = await picture(id).catch(() => null);
    if (!blob) return none();
    img.addEventListener('load', () => URL.revokeObjectURL(img.src), { once: true });
    img.src = URL.createObjectURL(blob);
  });
}

/** Fill `place` with a bar of the time's parts, in words beside it. `ms` is the round trip, seen from here. */
export function latency(place, { encode, search, total }, ms) {
  const parts = [
    ['encode', 'Encode', encode],
    ['search', 'Search', search],
    ['rest', 'Other work', total - (encode ?? 0) - search],
    ['network', 'Network', Math.max(0, ms - total)],
  ].filter(([, , time]) => time !== null && time >= 0.05);
  const bar = make('div', { className: 'bar' }, ...parts.map(([kind, , time]) => {
    const part = make('span', { dataset: { kind } });
    part.style.flexGrow = time;
    return part;
  }));
  bar.setAttribute('aria-hidden', 'true');
  const entries = parts.map(([kind, text, time]) => entry(kind, text, time));
  place.replaceChildren(bar, make('dl', {}, ...entries, entry('total', 'Server', total), entry('total', 'Round trip', ms)));
  place.hidden = false;
}

function entry(kind, text, time) {
  return make('div', { dataset: { kind } },
    make('dt', { textContent: text }), make('dd', { textContent: milliseconds(time) }));
}

const milliseconds = (time) => `${time.toLocaleString('en', { maximumFractionDigits: time < 10 ? 1 : 0 })} ms`;

function thumbnail(item) {
  const img = make('img', { alt: '', width: 320, height: 320, decoding: 'async' });
  const none = () => img.replaceWith(make('span', { textContent: 'No picture' }));
  if (item.attributes.image) showPicture(img, item.id, none);
  else return make('span', { textContent: 'No picture' });
  return img;
}

function score({ score: similarity, probability }) {
  const likely = typeof probability === 'number';
  const text = likely ? `${Math.round(100 * probability)} % likely` : `Similarity ${similarity.toFixed(2)}`;
  return make('p', { className: 'score', textContent: text, title: likely ? `Similarity ${similarity.toFixed(3)}` : '' });
}

function attributes(values) {
  const shown = Object.entries(values).filter(([name, value]) => name !== 'image' && value !== null);
  const texts = shown.map(([name, value]) => [words(name), said(value)]);
  const rows = [...texts.filter(short), ...texts.filter((text) => !short(text))].map(([name, text]) =>
    make('div', {}, make('dt', { textContent: name }), make('dd', { textContent: text })));
  if (!rows.length) return [];
  const count = Math.min(AT_ONCE, texts.filter(short).length || 1);
  const first = make('dl', {}, ...rows.slice(0, count));
  const rest = rows.slice(count);
  if (!rest.length) return [first];
  return [first, make('details', {}, make('summary', { textContent: `${rest.length} more` }), make('dl', {}, ...rest))];
}

const short = ([name, text]) => text.length <= SHORT && name !== 'Description';

function said(value) {
  if (typeof value === 'boolean') return value ? 'Yes' : 'No';
  if (typeof value === 'number') return value.toLocaleString('en', { maximumFractionDigits: 4 });
  return typeof value === 'object' ? JSON.stringify(value) : String(value);
}

const seen = new WeakMap();
const observer = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    observer.unobserve(target);
    seen.get(target)();
  }
}, { rootMargin: '200px' });

function whenSeen(element, then) {
  seen.set(element, then);
  observer.observe(element);
}
