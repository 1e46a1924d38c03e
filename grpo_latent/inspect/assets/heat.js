"use strict";
// An image with what a latent step is near to.

const pictures = new Map();
/** The decoded image of a data URI. */
function picture(src) {
  if (!pictures.has(src)) {
    pictures.set(src, new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("image cannot be decoded"));
      image.src = src;
    }));
  }
  return pictures.get(src);
}

/** Visual tokens of the block's image `imageIdx`: [offset, count]. */
function tokenRange(block, imageIdx) {
  const sizes = block.images.map((image) => image.rows * image.columns);
  return [sizes.slice(0, imageIdx).reduce((a, b) => a + b, 0), sizes[imageIdx]];
}

/** Which image holds the probe's nearest visual token. */
function topImage(block, probe) {
  for (let i = 0; i < block.images.length; i++) {
    const [offset, count] = tokenRange(block, i);
    if (probe && probe.top >= offset && probe.top < offset + count) return i;
  }
  return 0;
}

/**
 * Draws image, overlay, boxes and nearest patch.
 * mode: "heat" (colour), "spotlight" (far patches are darkened) or "off"; scale: [low, high] of the cosines.
 * A counter on the canvas keeps a slow image from overdrawing a later choice.
 */
async function drawHeat(canvas, block, imageIdx, probe, { mode, scale, size, labels }) {
  const entry = block.images[imageIdx];
  const ticket = (canvas.ticket || 0) + 1;
  canvas.ticket = ticket;
  const image = await picture(entry.src);
  if (canvas.ticket !== ticket) return;
  canvas.width = size;
  canvas.height = Math.round((size * entry.height) / entry.width);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = entry.width > 128;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const all = probe && cosines(probe);
  if (all && entry.rows && mode !== "off") overlay(context, canvas, block, imageIdx, all, probe.top, mode, scale, labels);
  context.setLineDash([6, 4]);
  for (const { image: boxImage, box } of block.boxes) {
    if (boxImage !== imageIdx) continue;
    const [x0, y0, x1, y1] = box.map((side, i) => side * (i % 2 ? canvas.height : canvas.width));
    for (const [color, width] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = color; context.lineWidth = width;
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }
  context.setLineDash([]);
  canvas.dataset.drawn = `${imageIdx}/${mode}/${probe ? probe.cosines || "" : ""}`;
}

function overlay(context, canvas, block, imageIdx, all, top, mode, scale, labels) {
  const entry = block.images[imageIdx], [offset, count] = tokenRange(block, imageIdx);
  const width = canvas.width / entry.columns, height = canvas.height / entry.rows;
  const span = scale[1] - scale[0] || 1;
  for (let i = 0; i < count; i++) {
    const t = (all[offset + i] - scale[0]) / span;
    const x = (i % entry.columns) * width, y = Math.floor(i / entry.columns) * height;
    context.fillStyle = mode === "heat" ? `rgba(${viridis(t).join(",")},0.55)` : `rgba(0,0,0,${0.82 * (1 - Math.max(0, Math.min(1, t)))})`;
    context.fillRect(x, y, width + 0.5, height + 0.5);
    if (labels && entry.columns <= 10) {
      context.font = `${Math.round(canvas.width / 32)}px system-ui, sans-serif`;
      context.textAlign = "right";
      context.lineWidth = 4;
      context.strokeStyle = "rgba(0,0,0,.75)";
      context.strokeText(all[offset + i].toFixed(2), x + width - 7, y + height - 9);
      context.fillStyle = "#fff";
      context.fillText(all[offset + i].toFixed(2), x + width - 7, y + height - 9);
    }
  }
  if (top >= offset && top < offset + count) {
    const i = top - offset;
    context.strokeStyle = "#fde725";
    context.lineWidth = Math.max(2, canvas.width / 160);
    context.strokeRect((i % entry.columns) * width + 1, Math.floor(i / entry.columns) * height + 1, width - 2, height - 2);
  }
}

/** The cosine under the pointer, or null. */
function cosineAt(event, canvas, block, imageIdx, probe) {
  const entry = block.images[imageIdx], all = probe && cosines(probe);
  if (!all || !entry.rows) return null;
  const rect = canvas.getBoundingClientRect();
  const column = Math.min(entry.columns - 1, Math.floor(((event.clientX - rect.left) / rect.width) * entry.columns));
  const row = Math.min(entry.rows - 1, Math.floor(((event.clientY - rect.top) / rect.height) * entry.rows));
  return { row, column, cosine: all[tokenRange(block, imageIdx)[0] + row * entry.columns + column] };
}
