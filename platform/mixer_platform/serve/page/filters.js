// Filters made of what the index says about its attributes.

import { make, words } from './dom.js';

const NO_FILTER = ['image', 'title', 'description', 'url']; // each item has its own
const LONGEST = 40; // characters; longer texts are prose
const AT_ONCE = 6; // values shown before "more"

/** Fill the form with one field an attribute, as GET /v1/attributes says; `calibrated` as GET /v1/status does. */
export function build(form, attributes, calibrated) {
  const fields = attributes.filter(({ name }) => !NO_FILTER.includes(name)).map(field).filter(Boolean);
  const switches = [flip('group_by', 'look', 'Show near-identical items once')];
  if (calibrated) switches.push(flip('min_probability', '0.5', 'Only items that are likely the same'));
  form.replaceChildren(...fields, ...switches, make('button', { type: 'reset', textContent: 'Clear filters' }));
}

/** Return `{fields, count}`: what the form adds to a request, and how many of its parts do. */
export function read(form) {
  const filter = {};
  for (const set of form.querySelectorAll('fieldset')) {
    const condition = CONDITIONS[set.dataset.kind](set);
    if (condition !== null) filter[set.dataset.name] = condition;
  }
  const fields = {};
  for (const { name, value } of form.querySelectorAll('.switch input:checked')) fields[name] = value;
  const count = Object.keys(filter).length + Object.keys(fields).length;
  if (Object.keys(filter).length) fields.filter = JSON.stringify(filter);
  return { fields, count };
}

const CONDITIONS = {
  text(set) {
    const chosen = [...set.querySelectorAll('input:checked')].map((input) => input.value);
    return chosen.length ? chosen : null;
  },
  number: (set) => range(set, (input) => input.valueAsNumber),
  time: (set) => range(set, ({ value, dataset }) => (dataset.bound === 'lte' ? `${value}T23:59:59.999999` : value)),
  boolean(set) {
    const { value } = set.querySelector('input:checked');
    return value === '' ? null : value === 'true';
  },
};

function range(set, valueOf) {
  const bounds = [...set.querySelectorAll('input')].filter((input) => input.value !== '');
  return bounds.length ? Object.fromEntries(bounds.map((input) => [input.dataset.bound, valueOf(input)])) : null;
}

function field(said, index) {
  const isTime = said.kind === 'text' && typeof said.min === 'string'; // times are texts that have an order
  const attribute = isTime ? { ...said, kind: 'time' } : said;
  const inputs = INPUTS[attribute.kind]?.(attribute, `filter-${index}`) ?? [];
  if (!inputs.length) return null;
  const dataset = { name: attribute.name, kind: attribute.kind };
  return make('fieldset', { dataset }, make('legend', { textContent: words(attribute.name) }), ...inputs);
}

const INPUTS = {
  text({ values }, name) {
    if (!values?.length || values.some((value) => value.length > LONGEST)) return [];
    const chips = values.map((value) => chip('checkbox', name, value, value));
    const rest = chips.slice(AT_ONCE);
    if (!rest.length) return [make('div', { className: 'chips' }, ...chips)];
    const summary = make('summary', { textContent: `${rest.length} more` });
    return [
      make('div', { className: 'chips' }, ...chips.slice(0, AT_ONCE)),
      make('details', { className: 'rest' }, summary, make('div', { className: 'chips' }, ...rest)),
    ];
  },
  number({ min, max }) {
    if (min === null || max === null || min === max) return [];
    return [make('div', { className: 'range' }, bound('number', 'gte', 'from', min), bound('number', 'lte', 'to', max))];
  },
  time({ min, max }) {
    if (min === max) return [];
    return [make('div', { className: 'range' }, bound('date', 'gte', 'from', min), bound('date', 'lte', 'to', max))];
  },
  boolean(_, name) {
    const choices = [['', 'Any'], ['true', 'Yes'], ['false', 'No']].map(([value, text]) => chip('radio', name, value, text));
    choices[0].firstChild.defaultChecked = true;
    return [make('div', { className: 'chips' }, ...choices)];
  },
};

function chip(type, name, value, text) {
  return make('label', { className: 'chip' }, make('input', { type, name, value }), make('span', { textContent: text }));
}

function bound(type, name, text, extreme) {
  const input = make('input', { type, dataset: { bound: name } });
  if (type === 'number') Object.assign(input, { step: 'any', inputMode: 'decimal', placeholder: String(extreme) });
  return make('label', {}, text, input);
}

function flip(name, value, text) {
  return make('label', { className: 'switch' }, make('input', { type: 'checkbox', name, value }), text);
}
