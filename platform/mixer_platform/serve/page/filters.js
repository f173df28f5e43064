// Filters made of what the index says about its attributes.

import { make, words } from './dom.js';

const NO_FILTER = ['image', 'title', 'description', 'url']; // each item has its own
const LONGEST = 40; // characters; longer texts are prose
const AT_ONCE = 6; // values shown before "more"
const LOOK = 'group_by';

/** Fill the form with one field an attribute; `attributes` is what GET /v1/attributes says. */
export function build(form, attributes) {
  const fields = attributes.filter(({ name }) => !NO_FILTER.includes(name)).map(field).filter(Boolean);
  const alike = make('label', { className: 'switch' },
    make('input', { type: 'checkbox', name: LOOK, value: 'look' }), 'Show near-identical items once');
  form.replaceChildren(...fields, alike, make('button', { type: 'reset', textContent: 'Clear filters' }));
}

/** Return `{filter, group_by, count}`: what the form asks for, and how many of its fields do. */
export function read(form) {
  const filter = {};
  for (const set of form.querySelectorAll('fieldset')) {
    const condition = CONDITIONS[set.dataset.kind](set);
    if (condition !== null) filter[set.dataset.name] = condition;
  }
  const groupBy = form.elements[LOOK]?.checked ? 'look' : null;
  return { filter, group_by: groupBy, count: Object.keys(filter).length + (groupBy ? 1 : 0) };
}

const CONDITIONS = {
  text(set) {
    const chosen = [...set.querySelectorAll('input:checked')].map((input) => input.value);
    return chosen.length ? chosen : null;
  },
  number(set) {
    const bounds = [...set.querySelectorAll('input')].filter((input) => input.value !== '');
    return bounds.length ? Object.fromEntries(bounds.map((input) => [input.dataset.bound, input.valueAsNumber])) : null;
  },
  boolean(set) {
    const { value } = set.querySelector('input:checked');
    return value === '' ? null : value === 'true';
  },
};

function field(attribute, index) {
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
    return [make('div', { className: 'range' }, bound('gte', 'from', min), bound('lte', 'to', max))];
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

function bound(name, text, extreme) {
  const input = make('input', {
    type: 'number', step: 'any', inputMode: 'decimal', placeholder: String(extreme), dataset: { bound: name },
  });
  return make('label', {}, text, input);
}
