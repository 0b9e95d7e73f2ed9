// One photo; a box is drawn with the pointer, a double click takes it away.
function render({ model, el }) {
  el.classList.add("lm-play");
  const frame = document.createElement("div"), img = document.createElement("img");
  const box = document.createElement("div"), hint = document.createElement("div");
  frame.className = "lm-crop";
  box.className = "lm-box";
  hint.className = "lm-hint";
  frame.append(img, box);
  el.append(frame, hint);
  let start = null;

  function show(b) {
    box.style.display = b.length === 4 ? "block" : "none";
    if (b.length !== 4) return;
    const names = ["left", "top", "width", "height"], [x0, y0, x1, y1] = b;
    [x0, y0, x1 - x0, y1 - y0].forEach((v, k) => (box.style[names[k]] = `${100 * v}%`));
  }
  function at(e) {
    const r = img.getBoundingClientRect(), inside = (v) => Math.min(1, Math.max(0, v));
    return [inside((e.clientX - r.left) / r.width), inside((e.clientY - r.top) / r.height)];
  }
  function between(a, b) {
    return [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])];
  }
  frame.addEventListener("pointerdown", (e) => {
    start = at(e);
    frame.setPointerCapture(e.pointerId);
    e.preventDefault();
  });
  frame.addEventListener("pointermove", (e) => start && show(between(start, at(e))));
  frame.addEventListener("pointerup", (e) => {
    if (!start) return;
    const b = between(start, at(e));
    start = null;
    if (b[2] - b[0] < 0.03 || b[3] - b[1] < 0.03) return show(model.get("box"));
    model.set("box", b);
    model.save_changes();
  });
  frame.addEventListener("dblclick", () => {
    model.set("box", []);
    model.save_changes();
  });
  function draw() {
    const uri = model.get("uri");
    frame.style.display = uri ? "" : "none";
    if (uri) img.src = uri;
    img.alt = model.get("words");
    hint.textContent = model.get("words");
    show(model.get("box"));
  }
  for (const name of ["uri", "box", "words"]) model.on(`change:${name}`, draw);
  draw();
}
export default { render };
