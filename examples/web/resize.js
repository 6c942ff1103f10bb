// Resizing as Pillow does it: bicubic with antialiasing, rounded to bytes after each direction. A canvas resizes in a
// way of its own, and a network answers a little differently then.

const cubic = (x) => {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
};

// For each place of the result: the first place of the source that counts, and the weights from there on.
function weights(from, to, first, count) {
  const scale = from / to, stretch = Math.max(scale, 1), support = 2 * stretch, result = [];
  for (let i = first; i < first + count; i++) {
    const centre = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const values = [];
    for (let j = start; j < end; j++) values.push(cubic((j - centre + 0.5) / stretch));
    const sum = values.reduce((a, b) => a + b, 0);
    result.push({ start, values: values.map((value) => value / sum) });
  }
  return result;
}

const byte = (value) => Math.min(255, Math.max(0, Math.round(value)));

// RGBA pixels [height, width] -> RGB bytes [size, size, 3]: the shorter side becomes `size`, the middle is kept.
export function resized(pixels, width, height, size) {
  const ratio = size / Math.min(width, height);
  const wide = width < height ? size : Math.trunc(width * ratio), high = width < height ? Math.trunc(height * ratio) : size;
  const across = weights(width, wide, Math.round((wide - size) / 2), size);
  const down = weights(height, high, Math.round((high - size) / 2), size);
  const rows = new Uint8ClampedArray(height * size * 3);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < size; x++) {
      const { start, values } = across[x];
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < values.length; k++) sum += values[k] * pixels[(y * width + start + k) * 4 + c];
        rows[(y * size + x) * 3 + c] = byte(sum);
      }
    }
  }
  const result = new Uint8ClampedArray(size * size * 3);
  for (let y = 0; y < size; y++) {
    const { start, values } = down[y];
    for (let i = 0; i < size * 3; i++) {
      let sum = 0;
      for (let k = 0; k < values.length; k++) sum += values[k] * rows[(start + k) * size * 3 + i];
      result[y * size * 3 + i] = byte(sum);
    }
  }
  return result;
}
