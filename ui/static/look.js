// Look inside: a click on a head in the table of heads chooses it.
page.chooseHead = (element, trigger) => element.addEventListener("click", event => {
    const button = event.target.closest("[data-head]");
    if (button) trigger("click", {layer: +button.dataset.layer, head: +button.dataset.head});
});

// Look inside: the style that marks the chosen token, counted from 1.
page.markToken = position =>
    `<style>#look-tokens :nth-child(${Math.max(1, position)} of .token-container) > .token
     { outline: 2px solid var(--ink); outline-offset: 1px }</style>`;
