// A place to drop a file on. It goes to the kernel in pieces, the next one when the last has arrived.
const PIECE = 2 ** 20;
function render({ model, el }) {
  el.classList.add("lm-play");
  const label = document.createElement("label"), input = document.createElement("input");
  const text = document.createElement("span");
  label.className = "lm-drop";
  input.type = "file";
  label.append(text, input);
  el.append(label);
  let file = null, waiting = null;

  const said = (s) => (text.textContent = s || model.get("words"));
  async function piece(number) {
    if (!file || waiting !== number) return;
    const from = number * PIECE;
    if (from >= file.size) {
      model.send({ end: file.name });
      waiting = file = null;
      return;
    }
    try {
      const bytes = await file.slice(from, from + PIECE).arrayBuffer();
      waiting = number + 1;
      said(`${file.name}: ${Math.min(100, Math.round((100 * (from + PIECE)) / file.size))} %`);
      model.send({ piece: number }, undefined, [bytes]);
    } catch (e) {
      waiting = file = null;
      said("this file cannot be read by the browser");
    }
  }
  function take(files) {
    if (!files || !files.length || file) return;
    file = files[0];
    waiting = 0;
    model.send({ begin: file.name, size: file.size });
  }
  input.addEventListener("change", () => (take(input.files), (input.value = "")));
  for (const name of ["dragenter", "dragover"])
    label.addEventListener(name, (e) => (e.preventDefault(), label.classList.add("lm-over")));
  for (const name of ["dragleave", "drop"]) label.addEventListener(name, () => label.classList.remove("lm-over"));
  label.addEventListener("drop", (e) => {
    e.preventDefault();
    e.stopPropagation();
    take(e.dataTransfer.files);
  });
  model.on("msg:custom", (msg) => {
    if ("next" in msg) piece(msg.next);
    if ("done" in msg) {
      file = waiting = null;
      said(msg.done);
    }
  });
  model.on("change:words", () => said());
  said();
}
export default { render };
