// The frame on the photo: moved and resized by mouse, finger, or the four sliders of its edges.

const WHOLE = { left: 0, top: 0, right: 1, bottom: 1 };
const FIRST = { left: 0.12, top: 0.12, right: 0.88, bottom: 0.88 };
const LEAST = 0.05; // of a side
const OTHER = { left: 'right', right: 'left', top: 'bottom', bottom: 'top' };

const sideways = (edge) => edge === 'left' || edge === 'right';
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** What part of the photo is searched. `changed()` is called after each change. */
export class Crop {
  #region = WHOLE;
  #drag = null;

  constructor(stage, frame, sliders, changed) {
    Object.assign(this, { stage, frame, sliders, changed });
    this.inputs = [...sliders.querySelectorAll('input')];
    for (const input of this.inputs) {
      input.addEventListener('input', () => this.#slide(input));
      input.addEventListener('focus', () => { frame.dataset.edge = input.dataset.edge; });
      input.addEventListener('blur', () => { delete frame.dataset.edge; });
    }
    stage.addEventListener('pointerdown', (event) => this.#begin(event));
    stage.addEventListener('pointermove', (event) => this.#move(event));
    for (const end of ['pointerup', 'pointercancel']) stage.addEventListener(end, () => { this.#drag = null; });
  }

  /** The part as fractions of the photo's sides. */
  get region() { return this.#region; }

  get active() { return !this.frame.hidden; }

  open() {
    this.frame.hidden = this.sliders.hidden = false;
    this.stage.classList.add('cropping');
    this.#set(FIRST);
  }

  close() {
    this.frame.hidden = this.sliders.hidden = true;
    this.stage.classList.remove('cropping');
    this.#region = WHOLE;
    this.#drag = null;
  }

  #set(region) {
    this.#region = region;
    const { style } = this.frame;
    style.left = `${100 * region.left}%`;
    style.top = `${100 * region.top}%`;
    style.right = `${100 * (1 - region.right)}%`;
    style.bottom = `${100 * (1 - region.bottom)}%`;
    for (const input of this.inputs) {
      const { edge } = input.dataset;
      const percent = Math.round(100 * region[edge]);
      input.value = percent;
      input.setAttribute('aria-valuetext', `${percent} % from the ${sideways(edge) ? 'left' : 'top'}`);
    }
    this.changed();
  }

  #slide(input) {
    this.#set(this.#with(input.dataset.edge, input.value / 100));
  }

  #with(edge, value) {
    const other = this.#region[OTHER[edge]];
    const low = edge === 'right' || edge === 'bottom' ? other + LEAST : 0;
    const high = edge === 'left' || edge === 'top' ? other - LEAST : 1;
    return { ...this.#region, [edge]: clamp(value, low, high) };
  }

  #begin(event) {
    if (!this.active || event.button > 0) return;
    event.preventDefault();
    this.stage.setPointerCapture(event.pointerId);
    const edges = event.target.dataset.edges?.split(' ') ?? [];
    this.#drag = { ...this.#at(event), edges, region: this.#region };
  }

  #move(event) {
    if (!this.#drag) return;
    const { x, y, edges, region } = this.#drag;
    const now = this.#at(event);
    if (edges.length) {
      for (const edge of edges) this.#region = this.#with(edge, sideways(edge) ? now.x : now.y);
      this.#set(this.#region);
    } else {
      const right = clamp(now.x - x, -region.left, 1 - region.right);
      const down = clamp(now.y - y, -region.top, 1 - region.bottom);
      this.#set({
        left: region.left + right, right: region.right + right, top: region.top + down, bottom: region.bottom + down,
      });
    }
  }

  #at(event) {
    const box = this.stage.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }
}
