// Photos to click. Pictures are asked for when they come into view.
function render({ model, el }) {
  el.classList.add("lm-play");
  const wall = document.createElement("div");
  wall.className = "lm-wall";
  el.append(wall);
  const pictures = new Map(), asked = new Set(), tiles = new Map();
  let waiting = [], timer = 0, clicks = 0;

  function flush() {
    timer = 0;
    for (let i = 0; i < waiting.length; i += 32) model.send({ want: waiting.slice(i, i + 32) });
    waiting = [];
  }
  function want(key) {
    if (pictures.has(key) || asked.has(key)) return;
    asked.add(key);
    waiting.push(key);
    timer = timer || setTimeout(flush, 10);
  }
  const seen = new IntersectionObserver(
    (entries) => entries.forEach((e) => e.isIntersecting && want(e.target.dataset.key)),
    { rootMargin: "150px" },
  );

  function tile(item) {
    const b = document.createElement("button");
    b.type = "button";
    b.className = "lm-tile";
    b.dataset.key = item.key;
    b.innerHTML = '<div class="lm-photo"><img alt=""></div><div class="lm-words"></div><div class="lm-note"></div>';
    b.addEventListener("click", () => {
      model.set("chosen", { key: item.key, n: Date.now() + ++clicks });
      model.save_changes();
    });
    seen.observe(b);
    return b;
  }
  function dress(b, item) {
    const [photo, words, note] = b.children, img = photo.firstChild;
    if (pictures.has(item.key)) img.src = pictures.get(item.key);
    img.alt = item.words || item.key;
    b.title = item.tip || item.words || "";
    words.textContent = item.words || "";
    note.textContent = item.note || "";
    const colour = model.get("colours")[item.frame];
    img.style.setProperty("--lm-frame", colour || "transparent");
    b.dataset.frame = item.frame || "";
    b.classList.toggle("lm-chosen", item.key === model.get("marked"));
  }
  function draw() {
    wall.dataset.empty = model.get("empty");
    wall.style.setProperty("--lm-side", `${model.get("side")}px`);
    wall.style.maxHeight = model.get("height") || "none";
    const items = model.get("items"), now = new Set(items.map((i) => i.key));
    for (const [key, b] of tiles) if (!now.has(key)) (seen.unobserve(b), b.remove(), tiles.delete(key));
    items.forEach((item, k) => {
      if (!tiles.has(item.key)) tiles.set(item.key, tile(item));
      const b = tiles.get(item.key);
      dress(b, item);
      if (wall.children[k] !== b) wall.insertBefore(b, wall.children[k] || null);
    });
    wall.dataset.n = items.length;
  }
  model.on("msg:custom", (msg) => {
    for (const [key, uri] of Object.entries(msg.pictures || {})) {
      pictures.set(key, uri);
      asked.delete(key);
      const b = tiles.get(key);
      if (b) b.querySelector("img").src = uri;
    }
  });
  for (const name of ["items", "marked", "side", "empty", "height"]) model.on(`change:${name}`, draw);
  draw();
  return () => seen.disconnect();
}
export default { render };
