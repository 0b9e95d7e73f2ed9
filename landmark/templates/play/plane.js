// Points on a plane, with edges between them; photos appear where there is room. A drag moves, a drag with shift
// selects, a click chooses, a double click shows all; after a click the wheel zooms.
function render({ model, el }) {
  el.classList.add("lm-play", "lm-plane");
  const canvas = document.createElement("canvas"), hint = document.createElement("div");
  hint.className = "lm-hint";
  el.append(canvas, hint);
  const pen = canvas.getContext("2d"), pictures = new Map(), asked = new Set();
  let view = { x: 0.5, y: 0.5, zoom: 1 }, at, frames, edges, drag = null, box = null, due = 0, clicks = 0;

  function floats(name, Type) {
    const v = model.get(name);
    if (!v || !v.byteLength) return new Type(0);
    return new Type(v.buffer.slice(v.byteOffset, v.byteOffset + v.byteLength));
  }
  function read() {
    at = floats("at", Float32Array);
    frames = floats("frames", Uint8Array);
    edges = floats("edges", Int32Array);
    later();
  }
  const size = () => ({ w: canvas.clientWidth || 600, h: model.get("height") });
  function onto(i) {
    const { w, h } = size(), m = margin();
    return [
      w / 2 + (at[2 * i] - view.x) * (w - 2 * m) * view.zoom,
      h / 2 - (at[2 * i + 1] - view.y) * (h - 2 * m) * view.zoom,
    ];
  }
  const margin = () => model.get("side") / 2 + 4; // so that no photo is cut
  const later = () => (due = due || requestAnimationFrame(draw));

  function draw() {
    due = 0;
    const { w, h } = size(), sharp = window.devicePixelRatio || 1, keys = model.get("points");
    const colours = model.get("palette"), n = Math.min(keys.length, at.length / 2);
    canvas.width = w * sharp;
    canvas.height = h * sharp;
    canvas.style.height = `${h}px`;
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, w, h);
    hint.textContent = model.get("words");
    pen.lineWidth = 1.2;
    for (let e = 0; e + 2 < edges.length; e += 3) {
      const [a, b] = [onto(edges[e]), onto(edges[e + 1])];
      pen.strokeStyle = "rgb(40 110 220 / 55%)";
      pen.lineWidth = 0.8 + Math.log2(1 + edges[e + 2] / 10);
      pen.beginPath();
      pen.moveTo(...a);
      pen.lineTo(...b);
      pen.stroke();
    }
    const seen = [];
    for (let i = 0; i < n; i++) {
      const [x, y] = onto(i);
      if (x < -30 || y < -30 || x > w + 30 || y > h + 30) continue;
      seen.push([i, x, y]);
    }
    const dot = seen.length > 5000 ? 1.2 : seen.length > 500 ? 2 : 3.5;
    seen.sort((a, b) => (frames[a[0]] || 0) - (frames[b[0]] || 0));
    for (const [i, x, y] of seen) {
      pen.fillStyle = colours[frames[i] || 0] || "#888";
      const r = frames[i] && model.get("loud").includes(frames[i]) ? dot + 2 : dot;
      pen.fillRect(x - r, y - r, 2 * r, 2 * r);
    }
    photos(seen, w, h);
    if (box) {
      pen.strokeStyle = "#1c1c1c";
      pen.setLineDash([4, 3]);
      pen.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
      pen.setLineDash([]);
    }
  }
  function photos(seen, w, h) {
    const side = model.get("side"), taken = new Set(), wanted = [], keys = model.get("points");
    const loud = model.get("loud");
    const first = [...seen].sort((a, b) => loud.includes(frames[b[0]]) - loud.includes(frames[a[0]]));
    for (const [i, x, y] of first) {
      const cell = `${Math.floor(x / side)},${Math.floor(y / side)}`;
      if ((taken.has(cell) && seen.length > 60) || taken.size > 160) continue;
      taken.add(cell);
      const key = keys[i], img = pictures.get(key);
      if (!img) {
        if (!asked.has(key) && wanted.length < 96) (asked.add(key), wanted.push(key));
        continue;
      }
      if (!img.complete || !img.naturalWidth) continue;
      const f = (side - 6) / Math.max(img.naturalWidth, img.naturalHeight);
      const [a, b] = [img.naturalWidth * f, img.naturalHeight * f];
      pen.fillStyle = model.get("palette")[frames[i] || 0] || "#888";
      pen.fillRect(x - a / 2 - 2, y - b / 2 - 2, a + 4, b + 4);
      pen.drawImage(img, x - a / 2, y - b / 2, a, b);
    }
    for (let k = 0; k < wanted.length; k += 32) model.send({ want: wanted.slice(k, k + 32) });
  }
  function place(e) {
    const r = canvas.getBoundingClientRect();
    return [e.clientX - r.left, e.clientY - r.top];
  }
  function nearest([x, y]) {
    let best = -1, d = model.get("side") / 2 + 2;
    for (let i = 0; i < at.length / 2; i++) {
      const [a, b] = onto(i), far = Math.hypot(a - x, b - y);
      if (far < d) [best, d] = [i, far];
    }
    return best;
  }
  canvas.tabIndex = 0;
  canvas.addEventListener("wheel", (e) => {
    if (document.activeElement !== canvas && !e.ctrlKey) return; // a page that is scrolled past is not zoomed
    e.preventDefault();
    const { w, h } = size(), [px, py] = place(e), before = view.zoom;
    view.zoom = Math.min(400, Math.max(1, view.zoom * Math.exp(-e.deltaY / 400)));
    const k = 1 / before - 1 / view.zoom;
    view.x += ((px - w / 2) / (w - 2 * margin())) * k;
    view.y -= ((py - h / 2) / (h - 2 * margin())) * k;
    later();
  }, { passive: false });
  canvas.addEventListener("pointerdown", (e) => {
    drag = { from: place(e), moved: false, select: e.shiftKey, view: { ...view } };
    canvas.setPointerCapture(e.pointerId);
    canvas.focus({ preventScroll: true });
  });
  canvas.addEventListener("pointermove", (e) => {
    if (!drag) return;
    const to = place(e), { w, h } = size(), [dx, dy] = [to[0] - drag.from[0], to[1] - drag.from[1]];
    drag.moved = drag.moved || Math.hypot(dx, dy) > 4;
    if (drag.select) box = [...drag.from, ...to];
    else if (drag.moved) {
      view.x = drag.view.x - dx / ((w - 2 * margin()) * view.zoom);
      view.y = drag.view.y + dy / ((h - 2 * margin()) * view.zoom);
    }
    later();
  });
  canvas.addEventListener("pointerup", (e) => {
    if (!drag) return;
    const keys = model.get("points"), was = drag;
    drag = null;
    if (was.select && box) {
      const [x0, y0, x1, y1] = [Math.min(box[0], box[2]), Math.min(box[1], box[3]), Math.max(box[0], box[2]),
        Math.max(box[1], box[3])];
      const inside = [];
      for (let i = 0; i < at.length / 2 && inside.length < 500; i++) {
        const [x, y] = onto(i);
        if (x >= x0 && x <= x1 && y >= y0 && y <= y1) inside.push(keys[i]);
      }
      box = null;
      model.set("selected", inside);
      model.save_changes();
    } else if (!was.moved) {
      const i = nearest(place(e));
      if (i >= 0) {
        model.set("chosen", { key: keys[i], n: Date.now() + ++clicks });
        model.save_changes();
      }
    }
    later();
  });
  canvas.addEventListener("dblclick", () => {
    view = { x: 0.5, y: 0.5, zoom: 1 };
    later();
  });
  model.on("msg:custom", (msg) => {
    for (const [key, uri] of Object.entries(msg.pictures || {})) {
      const img = new Image();
      img.onload = later;
      img.src = uri;
      pictures.set(key, img);
    }
  });
  for (const name of ["at", "frames", "edges", "points", "words"]) model.on(`change:${name}`, read);
  const wide = new ResizeObserver(later);
  wide.observe(canvas);
  read();
  return () => wide.disconnect();
}
export default { render };
