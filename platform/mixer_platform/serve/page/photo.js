// The photo: read upright, shown on a canvas, cut and scaled down before it travels.

const MAX_SIDE = 1024; // pixels; the encoder sees far fewer
const AS_THEY_ARE = ['image/jpeg', 'image/png', 'image/webp'];
const MAX_BYTES = 500_000; // of a file that is sent as it is

/** Read a file; `bitmap` is null where this browser cannot show it, and the service says what is wrong. */
export async function read(file) {
  const bitmap = await createImageBitmap(file, { imageOrientation: 'from-image' }).catch(() => null);
  return { file, bitmap, name: file.name || 'pasted picture' };
}

/** Draw the whole photo on a canvas, no larger than is sent. */
export function draw(photo, canvas) {
  paint(photo.bitmap, canvas, { left: 0, top: 0, right: 1, bottom: 1 });
  canvas.setAttribute('aria-label', `Your photo: ${photo.name}`);
}

/** Return what is sent: the file itself if it is small and whole, else a JPEG of `region` (fractions of the sides). */
export async function toUpload({ file, bitmap }, region) {
  const whole = region.left === 0 && region.top === 0 && region.right === 1 && region.bottom === 1;
  if (!bitmap) return file.slice(0, MAX_BYTES, file.type); // enough for the service to say what it is
  const small = Math.max(bitmap.width, bitmap.height) <= MAX_SIDE && file.size <= MAX_BYTES;
  if (whole && small && AS_THEY_ARE.includes(file.type)) return file;
  const canvas = document.createElement('canvas');
  paint(bitmap, canvas, region);
  return new Promise((resolve) => { canvas.toBlob(resolve, 'image/jpeg', 0.92); });
}

function paint(bitmap, canvas, { left, top, right, bottom }) {
  const x = Math.round(left * bitmap.width);
  const y = Math.round(top * bitmap.height);
  const width = Math.max(1, Math.round(right * bitmap.width) - x);
  const height = Math.max(1, Math.round(bottom * bitmap.height) - y);
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext('2d');
  context.imageSmoothingQuality = 'high';
  context.fillStyle = 'white'; // JPEG knows no transparency, and the service puts it on white too
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, x, y, width, height, 0, 0, canvas.width, canvas.height);
}
