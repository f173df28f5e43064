// Elements made by code: no markup is ever parsed, so nothing that a catalogue says can run.

/** Make an element; `properties` are its own, `dataset` among them, and children are elements or texts. */
export function make(tag, { dataset = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, dataset);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const by = (id) => document.getElementById(id);

/** Say an attribute's name as people write: "on_sale" is "On sale". */
export function words(name) {
  const text = name.replaceAll(/[_-]+/g, ' ').trim();
  return text.charAt(0).toUpperCase() + text.slice(1);
}

export const plural = (count, noun) => `${count.toLocaleString('en')} ${noun}${count === 1 ? '' : 's'}`;
