// A gallery whose pictures are links: each opens what is said about it (an element of the class "about") by its
// address alone, with or without this script. Here a form sifts the gallery, arrow keys walk, Escape closes.
(() => {
  const plain = text => text.normalize("NFKC").toLowerCase();

  const prepare = walk => {
    const form = walk.querySelector(".sieve"), said = form.querySelector("output");
    const cards = [...walk.querySelectorAll("a[data-words]")], strips = [...walk.querySelectorAll(".strip")];
    const opened = () => walk.querySelector(".about:target");
    const cardOf = about => cards.find(c => c.hash === `#${about.id}`);

    const passes = (card, field) => field.type === "search"
      ? plain(field.value).split(/\s+/).every(word => plain(card.dataset.words).includes(word))
      : card.dataset[field.name].split(" ").includes(field.value);
    const sift = () => {
      const asked = [...form.elements].filter(field => field.name && field.value);
      for (const card of cards) card.hidden = !asked.every(field => passes(card, field));
      const shown = cards.filter(card => !card.hidden).length;
      for (const strip of strips) {
        if (strip.querySelector("a[data-words]")) strip.hidden = !strip.querySelector("a[data-words]:not([hidden])");
      }
      said.textContent = shown === cards.length ? `all ${shown}` : `${shown} of ${cards.length}`;
    };

    const turned = () => {
      const about = opened();
      for (const card of cards) card.removeAttribute("aria-current");
      if (!about) return;
      about.focus({ preventScroll: true });
      cardOf(about).setAttribute("aria-current", "true");
      cardOf(about).scrollIntoView({ block: "nearest" });
    };
    const pressed = event => {
      if (event.target.closest("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
      const about = opened(), here = about ? cardOf(about) : event.target.closest("a[data-words]");
      if (!here) return;
      const seen = cards.filter(card => !card.hidden || card === here);
      const next = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const to = next && seen[seen.indexOf(here) + next];
      if (event.key === "Escape" && about) {
        location.hash = here.id;
        here.focus();
      } else if (to && about) location.hash = to.hash;
      else if (to) to.focus();
      else return;
      event.preventDefault();
    };

    form.hidden = false;
    form.addEventListener("input", sift);
    form.addEventListener("submit", event => event.preventDefault());
    walk.addEventListener("keydown", pressed);
    addEventListener("hashchange", turned);
    addEventListener("load", turned);
    sift();
  };
  document.querySelectorAll(".walk").forEach(prepare);
})();
