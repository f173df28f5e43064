// The page: what is asked (a photo, or an item), asking it, and every state of the answer.

import { ApiError, call, onMissingKey } from './api.js';
import { Crop } from './crop.js';
import { by, plural } from './dom.js';
import * as filters from './filters.js';
import { takeIn } from './intake.js';
import { draw, read, toUpload } from './photo.js';
import { blank, card, latency, showPicture } from './results.js';
import { announce, askForKey, noNotice, notice } from './say.js';

const PAGE = 24; // items at once
const WIDE = matchMedia('(min-width: 60rem)'); // photo and results side by side, as in page.css
const TYPING_MS = 300;
const WRONG_PHOTO = ['unreadable_image', 'body_too_large', 'unsupported_media_type'];

let photo = null;
let item = null; // the one whose like is wanted; null: the photo's
let next = null; // where the next items begin
let most = 1000; // items that the service lists of one query
let running = null;

const crop = new Crop(by('stage'), by('frame'), by('edges'), () => { by('search').textContent = 'Search this part'; });

/* What is asked */

async function usePhoto(file) {
  photo = await read(file);
  if (item || location.search) history.pushState({}, '', location.pathname);
  showPhoto();
  search();
}

function showPhoto() {
  item = null;
  document.body.dataset.view = 'search';
  closeCrop();
  if (photo.bitmap) draw(photo, by('photo'));
  by('query-title').textContent = 'Your photo';
  by('caption').textContent = photo.name;
  by('pick-label').textContent = 'Another photo';
  by('pick-label').classList.remove('primary');
  by('search').textContent = 'Search';
  reveal({ stage: photo.bitmap, photo: true, like: false, caption: true, crop: photo.bitmap, search: photo.bitmap, back: false });
}

function useItem(wanted) {
  history.pushState({ like: { id: wanted.id, title: wanted.title } }, '', `?like=${encodeURIComponent(wanted.id)}`);
  showItem(wanted);
  search();
}

function showItem(wanted) {
  item = wanted;
  document.body.dataset.view = 'search';
  closeCrop();
  by('query-title').textContent = 'More like this';
  by('caption').textContent = wanted.title ?? wanted.id;
  const img = by('like').cloneNode();
  img.removeAttribute('src');
  by('like').replaceWith(img); // a new one, for the old one's listeners are of another item
  reveal({ stage: true, photo: false, like: true, caption: true, crop: false, search: false, back: photo });
  showPicture(img, wanted.id, () => { by('stage').hidden = true; });
}

function reveal(parts) {
  for (const [id, shown] of Object.entries(parts)) by(id).hidden = !shown;
}

function closeCrop() {
  crop.close();
  by('crop').setAttribute('aria-pressed', 'false');
  by('crop').textContent = 'Crop';
}

function toggleCrop() {
  if (crop.active) {
    closeCrop();
    by('search').textContent = 'Search';
    return;
  }
  crop.open();
  by('crop').setAttribute('aria-pressed', 'true');
  by('edges').querySelector('input').focus({ preventScroll: true });
}

/* Asking */

async function search({ append = false, focus = true } = {}) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  busy(append);
  try {
    const { body, ms } = await ask(append ? next : 0, mine.signal);
    if (mine === running) show(body, ms, append, focus);
  } catch (error) {
    if (mine === running && error.name !== 'AbortError') fail(error, append, focus);
  } finally {
    if (mine === running) rest();
  }
}

async function ask(offset, signal) {
  const fields = { k: Math.min(PAGE, most - offset), offset, ...filters.read(by('filter-form')).fields };
  if (item) return call(`items/${encodeURIComponent(item.id)}/similar?${new URLSearchParams(fields)}`, { signal }, saturated);
  const form = new FormData();
  form.append('photo', await toUpload(photo, crop.region), photo.name);
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return call('search', { method: 'POST', body: form, signal }, saturated);
}

/* The answer's states */

function busy(append) {
  by('results').setAttribute('aria-busy', 'true');
  by('search').disabled = by('more').disabled = true;
  noNotice();
  if (!append && !by('grid').querySelector('.card:not(.blank)')) by('grid').replaceChildren(...Array.from({ length: 8 }, blank));
  if (!append) title('Searching…');
  announce('Searching');
}

function rest() {
  by('results').setAttribute('aria-busy', 'false');
  by('search').disabled = by('more').disabled = false;
}

function show(body, ms, append, focus) {
  const cards = body.items.map((found) => card(found, useItem));
  if (append) by('grid').append(...cards);
  else by('grid').replaceChildren(...cards);
  next = body.next_offset ?? null;
  by('more').hidden = next === null || !body.items.length;
  latency(by('latency'), body.timings_ms, ms);
  const count = by('grid').children.length;
  title(count ? `${plural(count, 'item')}${next === null ? '' : ', nearest first'}` : 'No items');
  const why = explain(body, count);
  if (why) notice(...why);
  else noNotice();
  announce([`${plural(cards.length, append ? 'more item' : 'item')}.`, why?.[1], nearest(body.items[0], append)].filter(Boolean).join(' '));
  if (append) cards[0]?.querySelector('button').focus();
  else if (focus) goToResults();
  if (by('filters').hidden) describe().catch(() => {}); // the key was not there at the beginning
}

function goToResults() {
  by('results-title').focus({ preventScroll: WIDE.matches });
  if (!WIDE.matches) by('results').scrollIntoView();
}

function explain(body, count) {
  const filtering = filters.read(by('filter-form')).count;
  const actions = filtering ? [['Clear filters', () => by('filter-form').reset()]] : [];
  if (body.degraded) {
    const missing = (body.missing_shards ?? []).join(', ');
    return ['warning', `A part of the catalogue did not answer, so something may be missing here${missing ? ` (${missing})` : ''}.`];
  }
  if (body.nothing_similar) {
    return ['empty', 'Nothing here is similar enough. Try another photo, or crop to the thing you mean.', { actions }];
  }
  if (!count && filtering) return ['empty', 'No item passes these filters.', { actions }];
  return count ? null : ['empty', 'Nothing was found.'];
}

const nearest = (first, append) => (first && !append ? `Nearest: ${first.title ?? first.id}.` : null);

function fail(error, append, focus) {
  const known = error instanceof ApiError;
  if (!known) console.error(error);
  if (!append) {
    by('grid').replaceChildren();
    by('more').hidden = by('latency').hidden = true;
    title('No results');
  }
  const again = ['Try again', () => search({ append })];
  const other = ['Choose another photo', () => by('pick').click()];
  const action = !item && WRONG_PHOTO.includes(error.code) ? other : again;
  const text = known ? error.message : 'This page failed; load it again.';
  announce(text);
  notice('error', text, { actions: [action], requestId: error.requestId });
  if (focus) by('notice').querySelector('button').focus();
}

function saturated(seconds) {
  const stop = () => { running?.abort(); running = null; rest(); fail(new ApiError('Stopped.'), false, true); };
  if (by('notice').hidden) announce('The service is busy and is asked again soon.');
  notice('waiting', `The service is busy. Trying again in ${seconds} s.`, { actions: [['Stop', stop]] });
}

function title(text) { by('results-title').textContent = text; }

/* Events */

takeIn(usePhoto);
by('search').addEventListener('click', () => search());
by('crop').addEventListener('click', toggleCrop);
by('more').addEventListener('click', () => search({ append: true }));
by('back').addEventListener('click', () => {
  history.pushState({}, '', location.pathname);
  showPhoto();
  search();
});

let typing = 0;
function filtered() {
  const { count } = filters.read(by('filter-form'));
  by('filter-count').hidden = !count;
  by('filter-count').textContent = `${count} set`;
  clearTimeout(typing);
  typing = setTimeout(() => search({ focus: false }), TYPING_MS);
}
by('filter-form').addEventListener('input', filtered);
by('filter-form').addEventListener('reset', () => setTimeout(filtered));
by('filter-form').addEventListener('submit', (event) => event.preventDefault());

window.addEventListener('popstate', open);

onMissingKey(askForKey);

/* The beginning, and steps back to it */

async function open() {
  const id = new URLSearchParams(location.search).get('like');
  if (id) {
    const known = history.state?.like ?? await call(`items/${encodeURIComponent(id)}`).then(({ body }) => body, () => null);
    showItem(known ?? { id, title: null });
    search({ focus: false });
  } else if (photo) {
    showPhoto();
    search({ focus: false });
  } else {
    document.body.dataset.view = 'start';
  }
}

async function describe() {
  const [status, attributes] = await Promise.all([call('status'), call('attributes')]);
  by('catalogue').textContent = typeof status.body.items === 'number' ? plural(status.body.items, 'item') : '';
  most = status.body.max_k ?? most;
  filters.build(by('filter-form'), attributes.body.attributes, status.body.calibrated);
  by('filters').hidden = false;
  by('filters').open = WIDE.matches;
}

await describe().catch((error) => console.warn(error.message)); // a search says what is wrong
await open();
