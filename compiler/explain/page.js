// Shows what is told of a step beside the diagram: on pointing at it, and for good on a click.
const details = JSON.parse(document.getElementById("details").textContent);
const panel = document.querySelector("aside");
const greeting = panel.innerHTML;
let pinned = null;

function show(step) {
  panel.innerHTML = step ? details[step.dataset.step] : greeting;
}

for (const step of document.querySelectorAll("[data-step]")) {
  step.addEventListener("mouseenter", () => show(step));
  step.addEventListener("focus", () => show(step));
  step.addEventListener("mouseleave", () => show(pinned));
  step.addEventListener("click", () => {
    pinned?.classList.remove("on");
    pinned = pinned === step ? null : step;
    pinned?.classList.add("on");
    show(pinned);
  });
}
