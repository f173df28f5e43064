// Ways for a photo to come in: picked, taken, pasted, dropped.

import { by } from './dom.js';

const carriesFiles = (event) => event.dataTransfer?.types.includes('Files');

/** Call `use(file)` for each file that comes in. */
export function takeIn(use) {
  for (const id of ['pick', 'take']) {
    by(id).addEventListener('change', ({ target }) => {
      if (target.files[0]) use(target.files[0]);
      target.value = ''; // the same file can be chosen again
    });
  }
  document.addEventListener('paste', ({ clipboardData }) => {
    if (clipboardData.files[0]) use(clipboardData.files[0]);
  });
  document.addEventListener('dragover', (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    by('veil').hidden = false;
  });
  document.addEventListener('dragleave', (event) => {
    if (!event.relatedTarget) by('veil').hidden = true;
  });
  document.addEventListener('drop', (event) => {
    by('veil').hidden = true;
    if (!carriesFiles(event)) return;
    event.preventDefault();
    if (event.dataTransfer.files[0]) use(event.dataTransfer.files[0]);
  });
}
