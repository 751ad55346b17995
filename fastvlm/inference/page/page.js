"use strict";
// The whole page: what is said lives in `turns`, what waits to be said in `waiting`; the server keeps nothing.
const $ = (id) => document.getElementById(id);
const turns = []; // {role: "user", text, images: [data URL]} or {role: "assistant", text, cost}
// The server takes `max_images` a request, and a request holds the whole conversation: its first images drop out of it.
let waiting = [], model = { id: "", max_images: 8 }, running = null;

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const notice = (text) => { $("notice").textContent = text; };

// ---------------------------------------------------------------------------------------------------------- images

const readFile = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

async function addFiles(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/"));
  notice(images.length < files.length ? "Only images can be added." : "");
  for (const file of images) {
    if (waiting.length >= model.max_images) { notice(`At most ${model.max_images} images a message.`); break; }
    waiting.push({ url: await readFile(file), name: file.name || "pasted image" });
  }
  showWaiting();
  $("text").focus();
}

function showWaiting() {
  $("waiting").replaceChildren(...waiting.map((image, i) => {
    const remove = element("button", { type: "button", textContent: "\u00d7", title: `Remove ${image.name}` });
    remove.setAttribute("aria-label", `Remove ${image.name}`);
    remove.onclick = () => { waiting.splice(i, 1); showWaiting(); $("text").focus(); };
    return element("li", {}, element("img", { src: image.url, alt: image.name }), remove);
  }));
}

// A question that got no answer gives its images back, to be asked about again or removed.
function putBack(turn) {
  const lost = (turn.images || []).filter((url) => !waiting.some((image) => image.url === url));
  waiting = [...lost.map((url, i) => ({ url, name: `image ${i + 1}` })), ...waiting].slice(0, model.max_images);
  showWaiting();
}

$("files").onchange = (event) => { addFiles(event.target.files).then(() => { event.target.value = ""; }); };
$("choose").onkeydown = (event) => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("files").click(); }
};
document.addEventListener("paste", (event) => {
  const files = event.clipboardData ? [...event.clipboardData.files] : [];
  if (files.length) { event.preventDefault(); addFiles(files); }
});
let depth = 0; // dragenter and dragleave also come from every element inside
const hasFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragenter", (event) => { if (hasFiles(event)) { depth += 1; $("drop").hidden = false; } });
document.addEventListener("dragleave", (event) => { if (hasFiles(event) && --depth <= 0) { depth = 0; $("drop").hidden = true; } });
document.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = 0;
  $("drop").hidden = true;
  addFiles(event.dataTransfer.files);
});

// ------------------------------------------------------------------------------------------------------ conversation

const imagesOf = (some) => some.flatMap((turn) => turn.images || []);
// How many of a conversation's images, from its first on, are no longer sent.
const dropped = (some) => Math.max(0, imagesOf(some).length - model.max_images);

function messagesOf(some) {
  const system = $("system").value.trim();
  let skip = dropped(some);
  const said = some.map(({ role, text, images = [] }) => {
    if (role === "assistant") return { role, content: text };
    const sent = images.slice(skip);
    skip = Math.max(0, skip - images.length);
    return { role, content: [...sent.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }] };
  });
  return system ? [{ role: "system", content: system }, ...said] : said;
}

// Says which images the model is no longer shown, at the images and in words.
function showDropped() {
  const count = dropped(turns);
  document.querySelectorAll(".turn.user:not(.unasked) .pictures img").forEach((image, i) => {
    image.classList.toggle("dropped", i < count);
    image.title = i < count ? "No longer shown to the model" : "";
    if (i < count) image.alt = image.alt.replace(/(, no longer shown to the model)?$/, ", no longer shown to the model");
  });
  if (count) notice(`The model is shown the last ${model.max_images} images of a chat; ${count} older ${count > 1 ? "are" : "is"} left out.`);
}

const call = (path, body, signal) => fetch(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ model: model.id, ...body }), signal });

async function problem(reply) {
  try { return (await reply.json()).error.message; } catch { return `the server answered ${reply.status}`; }
}

// Server-sent events, one JSON object each.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function view(turn) {
  const bubble = element("div", { className: "bubble", textContent: turn.text });
  const made = element("div", { className: `turn ${turn.role}` });
  if (turn.images && turn.images.length) {
    made.append(element("div", { className: "pictures" }, ...turn.images.map((src, i) => element("img", { src, alt: `image ${i + 1}` }))));
  }
  if (turn.text || turn.role === "assistant") made.append(bubble);
  $("hint").hidden = true;
  $("chat").append(made);
  scrollDown(true);
  return { made, bubble };
}

function scrollDown(always) {
  const chat = $("chat");
  if (always || chat.scrollHeight - chat.scrollTop - chat.clientHeight < 160) chat.scrollTop = chat.scrollHeight;
}

async function answer() {
  const turn = { role: "assistant", text: "", cost: null };
  const asked = turns.slice();
  const { made, bubble } = view(turn);
  made.classList.add("running");
  running = new AbortController();
  busy(true);
  const started = performance.now();
  let first = null, usage = null;
  try {
    const reply = await call("v1/chat/completions", {
      messages: messagesOf(asked), stream: true, temperature: Number($("temperature").value) || 0,
      max_tokens: Math.max(1, Number($("max").value) || 128) }, running.signal);
    if (!reply.ok) throw new Error(await problem(reply));
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0].delta.content;
      if (piece) {
        first ??= performance.now() - started;
        turn.text += piece;
        bubble.textContent = turn.text;
        scrollDown(false);
      }
      usage = chunk.usage || usage;
      turn.cost = chunk.fastvlm || turn.cost;
    }
    turns.push(turn);
    if (!turn.text) bubble.append(element("em", { className: "cost", textContent: "an empty answer" }));
  } catch (error) {
    if (error.name === "AbortError" && turn.text) turns.push(turn);
    else putBack(asked.at(-1));
    if (error.name === "AbortError") {
      made.append(element("div", { className: "cost", textContent: "stopped" }));
    } else {
      made.append(element("div", { className: "wrong", textContent: error.message }));
    }
  }
  made.classList.remove("running");
  running = null;
  busy(false);
  document.querySelectorAll(".retry").forEach((old) => old.remove());
  const tools = element("div", { className: "tools" });
  if (turn.cost && usage) tools.append(element("span", { className: "cost", textContent: spent(turn.cost, usage, first) }));
  tools.append(element("button", { type: "button", className: "retry", textContent: "Retry", onclick: retry }));
  if (turn.cost && asked.some((t) => t.images && t.images.length)) {
    const button = element("button", { type: "button", className: "look", textContent: "Where it looked" });
    button.onclick = () => regions(button, made, [...asked, turn]);
    tools.append(button);
  }
  made.append(tools);
  scrollDown(false);
}

function spent(cost, usage, first) {
  const reused = cost.reused_tokens ? `, ${cost.reused_tokens} reused` : "";
  const speed = cost.tokens_per_second ? `, ${cost.tokens_per_second.toFixed(0)} tokens/s` : "";
  const here = first === null ? "" : ` (here ${first.toFixed(0)} ms)`;
  return `${cost.image_tokens} image tokens, ${usage.prompt_tokens} prompt tokens${reused}; first token ` +
    `${(1000 * cost.first_token_seconds).toFixed(0)} ms${here}; ${usage.completion_tokens} tokens${speed}`;
}

function retry() {
  if (running || !turns.length) return;
  if (turns.at(-1).role === "assistant") turns.pop();
  const views = $("chat").querySelectorAll(".turn.assistant");
  if (views.length) views[views.length - 1].remove();
  const again = turns.at(-1).images || [];
  waiting = waiting.filter((image) => !again.includes(image.url));
  showWaiting();
  answer();
}

// Where the button that had the focus goes, another takes it: a keyboard has nothing else to point with.
const lost = () => document.activeElement === document.body;

function busy(is) {
  const [shown, gone] = is ? [$("stop"), $("send")] : [$("send"), $("stop")];
  const had = lost() || document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (had) shown.focus({ preventScroll: true });
  $("clear").disabled = is;
}

function send() {
  const text = $("text").value.trim();
  if (running || (!text && !waiting.length)) return;
  notice("");
  const turn = { role: "user", text, images: waiting.map((image) => image.url) };
  if (turns.length && turns.at(-1).role === "user") { // a question that got no answer is asked anew
    turns.pop();
    [...document.querySelectorAll(".turn.user")].at(-1).classList.add("unasked");
  }
  turns.push(turn);
  view(turn);
  showDropped();
  waiting = [];
  showWaiting();
  $("text").value = "";
  grow();
  answer();
}

function clear() {
  if (running) return;
  turns.length = 0;
  waiting = [];
  showWaiting();
  notice("");
  $("chat").replaceChildren($("hint"));
  $("hint").hidden = false;
  $("text").focus();
}

// ---------------------------------------------------------------------------------------------------------- regions

async function regions(button, made, said) {
  const open = made.querySelector(".regions");
  if (open) { open.remove(); return; }
  button.disabled = true;
  const box = element("div", { className: "regions" });
  try {
    const reply = await call("v1/attention", { messages: messagesOf(said) });
    if (!reply.ok) throw new Error(await problem(reply));
    const views = (await reply.json()).images;
    const first = dropped(said), urls = imagesOf(said).slice(first);
    views.forEach((seen, i) => box.append(figure(urls[i], seen, first + i)));
  } catch (error) {
    box.append(element("p", { className: "wrong", textContent: error.message }));
  }
  button.disabled = false;
  if (lost()) button.focus({ preventScroll: true });
  made.append(box);
  scrollDown(false);
}

// The image as a square, as the model sees it, the brighter the more a patch counts.
function figure(url, seen, number) {
  const canvas = element("canvas", { width: 480, height: 480 });
  canvas.setAttribute("role", "img");
  const caption = element("figcaption", { className: "cost" });
  const slider = element("input", { type: "range", min: 0, max: seen.tokens.length, value: 0 });
  slider.setAttribute("aria-label", `Image ${number + 1}: visual token`);
  const image = new Image();
  const draw = () => {
    const token = Number(slider.value), shares = token ? seen.tokens[token - 1] : seen.answer;
    const pen = canvas.getContext("2d"), side = canvas.width, least = Math.min(...shares), range = Math.max(...shares) - least;
    const scale = side / (model.fit === "crop" ? Math.min : Math.max)(image.width, image.height);
    const [w, h] = model.fit === "squash" ? [side, side] : [image.width * scale, image.height * scale];
    pen.fillStyle = "#888";
    pen.fillRect(0, 0, side, side);
    pen.drawImage(image, (side - w) / 2, (side - h) / 2, w, h);
    const cell = [side / seen.columns, side / seen.rows];
    shares.forEach((share, i) => {
      pen.fillStyle = `rgba(8, 12, 24, ${0.78 * (1 - (share - least) / (range || 1))})`;
      pen.fillRect((i % seen.columns) * cell[0], Math.floor(i / seen.columns) * cell[1], Math.ceil(cell[0]), Math.ceil(cell[1]));
    });
    caption.textContent = token ? `visual token ${token} of ${seen.tokens.length}: the regions it stands for`
      : "where the answer looked, over all visual tokens";
    canvas.setAttribute("aria-label", `Image ${number + 1}: ${caption.textContent}`);
  };
  image.onload = draw;
  slider.oninput = draw;
  image.src = url;
  return element("figure", {}, canvas, caption, slider);
}

// ------------------------------------------------------------------------------------------------------------- keys

const grow = () => { const t = $("text"); t.style.height = "auto"; t.style.height = `${t.scrollHeight + 2}px`; };
$("text").oninput = grow;
$("form").onsubmit = (event) => { event.preventDefault(); send(); };
$("stop").onclick = () => running && running.abort();
$("clear").onclick = clear;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
  else if (event.key === "Escape") $("settings").open = false;
  else if (event.altKey && event.code === "KeyI") { event.preventDefault(); $("files").click(); }
  else if (event.altKey && event.code === "KeyR") { event.preventDefault(); retry(); }
  else if (event.altKey && event.code === "KeyN") { event.preventDefault(); clear(); }
  else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === $("text")) {
    event.preventDefault();
    send();
  }
});

fetch("v1/models").then((reply) => reply.json()).then((list) => {
  model = list.data[0];
  $("model").textContent = `${model.id}, ${model.image_size} px, ${model.tokens_per_view} tokens an image`;
}).catch(() => notice("The server does not answer."));
$("text").focus();
