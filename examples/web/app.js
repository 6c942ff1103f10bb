// The page: loads the compressed network, classifies a photo, and loads the float network beside it if asked to.
// With `?check` in its address it answers all samples and posts what it found to the server that serves it.

import * as ort from "./ort.wasm.min.mjs";
import { resized } from "./resize.js";

const SIZE = 224, MEAN = 127, SCALE = 128; // as the network was trained: (x - 127) / 128
const find = (id) => document.getElementById(id);
const mb = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 2 : 1)} MB`;
const state = { facts: null, small: null, float: null, image: null };

async function download(path, progress) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  const total = Number(response.headers.get("Content-Length")), parts = [];
  let received = 0;
  for await (const part of chunks(response.body)) {
    parts.push(part);
    received += part.length;
    progress?.(received, total);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function* chunks(stream) {
  const reader = stream.getReader();
  for (let step = await reader.read(); !step.done; step = await reader.read()) yield step.value;
}

async function network(path, progress) {
  const start = performance.now(), bytes = await download(path, progress);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  return { session, bytes: bytes.length, loadMs: performance.now() - start };
}

async function pixels(source) {
  const bitmap = await createImageBitmap(source);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return resized(context.getImageData(0, 0, bitmap.width, bitmap.height).data, bitmap.width, bitmap.height, SIZE);
}

async function answer({ session }, rgb) {
  const input = new Float32Array(3 * SIZE * SIZE), area = SIZE * SIZE;
  for (let i = 0; i < area; i++) for (let c = 0; c < 3; c++) input[c * area + i] = (rgb[i * 3 + c] - MEAN) / SCALE;
  const start = performance.now();
  const outputs = await session.run({ [session.inputNames[0]]: new ort.Tensor("float32", input, [1, 3, SIZE, SIZE]) });
  const ms = performance.now() - start, logits = outputs[session.outputNames[0]].data;
  const top = Math.max(...logits), odds = Array.from(logits, (value) => Math.exp(value - top));
  const sum = odds.reduce((a, b) => a + b, 0);
  const best = odds.map((odd, index) => ({ index, probability: odd / sum }));
  return { ms, best: best.sort((a, b) => b.probability - a.probability).slice(0, 5) };
}

function bar(share, name = "") {
  const outer = document.createElement("span"), inner = document.createElement("i");
  outer.className = `bar ${name}`;
  inner.style.width = `${Math.max(share * 100, 0.8)}%`;
  outer.append(inner);
  return outer;
}

function line(tag, left, right) {
  const row = document.createElement(tag);
  for (const text of [left, right]) {
    const cell = document.createElement("span");
    cell.textContent = text;
    row.append(cell);
  }
  return row;
}

async function classify(source, prepared = pixels(source)) {
  state.image = source;
  const rgb = await prepared, found = await answer(state.small, rgb);
  find("bars").replaceChildren(...found.best.map(({ index, probability }) => {
    const item = document.createElement("li");
    item.append(line("div", state.facts.labels[index], `${(probability * 100).toFixed(1)} %`), bar(probability));
    return item;
  }));
  find("status").textContent = `It is ${state.facts.labels[found.best[0].index]}`;
  find("timing").textContent = `answered in ${found.ms.toFixed(0)} ms · loaded in ${state.small.loadMs.toFixed(0)} ms`;
  find("verdict").textContent = "";
  if (state.float) {
    const other = await answer(state.float, rgb), same = other.best[0].index === found.best[0].index;
    const said = `${state.facts.labels[other.best[0].index]}, ${(other.best[0].probability * 100).toFixed(1)} %`;
    find("verdict").textContent = `The float network says ${same ? "the same" : "otherwise"}: ${said}, in ${other.ms.toFixed(0)} ms.`;
  }
  return found;
}

function show(source, button, prepared) {
  const image = find("photo");
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(source);
  document.querySelectorAll("#samples button").forEach((one) => one.setAttribute("aria-pressed", one === button));
  return classify(source, prepared);
}

async function fetched(photo) {
  return (await fetch(`photos/${photo.file}`)).blob();
}

async function sample(photo, button) {
  return show(await fetched(photo), button);
}

function samples() {
  return state.facts.photos.map((photo, number) => {
    const button = document.createElement("button"), image = document.createElement("img");
    image.src = `photos/${photo.file}`;
    image.loading = "lazy";
    image.alt = `sample ${number + 1}`;
    button.type = "button";
    button.append(image);
    button.addEventListener("click", () => sample(photo, button).catch(failed));
    find("samples").append(button);
    return { photo, button };
  });
}

function sizes() {
  const { bytes, float_bytes: floatBytes } = state.facts;
  find("size").textContent = mb(bytes);
  for (const [name, size, kind] of [["this network", bytes, ""], ["the float network", floatBytes, "other"]]) {
    const value = document.createElement("dd");
    value.append(bar(size / floatBytes, kind));
    find("sizes").append(line("dt", name, mb(size)), value);
  }
}

async function loadFloat() {
  const button = find("float");
  button.disabled = true;
  state.float = await network("float.onnx", (done, total) => {
    button.textContent = `Loading … ${mb(done)}${total ? ` of ${mb(total)}` : ""}`;
  });
  button.textContent = `Loaded in ${(state.float.loadMs / 1000).toFixed(1)} s`;
  await classify(state.image);
}

function failed(error) {
  find("status").textContent = `That did not work: ${error.message ?? error}`;
  console.error(error);
}

function listen() {
  const drop = find("drop");
  find("file").addEventListener("change", ({ target }) => target.files[0] && show(target.files[0]).catch(failed));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) show(event.dataTransfer.files[0]).catch(failed);
    });
  }
  find("float").addEventListener("click", () => loadFloat().catch(failed));
}

async function check(all, firstAnswer) {
  const photos = [];
  for (const { photo, button } of all) {
    const { best: [first] } = await sample(photo, button);
    photos.push({ answer: first.index, probability: first.probability });
  }
  const entry = performance.getEntriesByType("resource").find((one) => one.name.endsWith("network.onnx"));
  const body = JSON.stringify({ photos, ...firstAnswer, transferredBytes: entry.transferSize });
  await fetch("answers", { method: "POST", body });
}

// onnxruntime starts with the first session that it is asked for. An empty one lets it compile its WebAssembly while
// the network and the first photo are on their way.
const startRuntime = () => ort.InferenceSession.create(new Uint8Array(0), { executionProviders: ["wasm"] }).catch(() => {});

// The facts, and the first photo as the network takes it.
async function prepare() {
  const facts = await (await fetch("facts.json")).json(), source = await fetched(facts.photos[0]);
  return { facts, source, rgb: await pixels(source) };
}

async function start() {
  listen();
  startRuntime();
  const [{ facts, source, rgb }, small] = await Promise.all([
    prepare(),
    network("network.onnx", (done) => { find("status").textContent = `Loading … ${mb(done)}`; }),
  ]);
  Object.assign(state, { facts, small });
  sizes();
  const all = samples();
  await show(source, all[0].button, rgb);
  const firstAnswerMs = performance.now(), { loadEventEnd } = performance.getEntriesByType("navigation")[0];
  const firstAnswer = { firstAnswerMs, afterLoadMs: firstAnswerMs - loadEventEnd };
  const options = new URLSearchParams(location.search);
  if (options.has("check")) await check(options.get("check") === "first" ? [] : all, firstAnswer);
  if (options.has("float")) await loadFloat();
}

start().catch(failed);
