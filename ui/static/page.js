// What the browser does without the server, for all tabs. Each tab adds its functions to `page`,
// and its Python file names them: js="page.someFunction".
window.page = {
    // An HTML element with properties and children. A string becomes text, never HTML.
    element(tag, properties = {}, ...children) {
        const element = Object.assign(document.createElement(tag), properties);
        element.append(...children);
        return element;
    },

    // A bar that shows how much of the model's context is used.
    gauge(used, size) {
        const part = page.element('i');
        part.style.width = `${100 * used / size}%`;
        return page.element('span', {
            className: 'bar', role: 'meter', ariaLabel: 'Tokens used',
            ariaValueNow: used, ariaValueMax: size}, part);
    },

    // Saves a text as a file.
    download(name, text) {
        const address = URL.createObjectURL(new Blob([text], {type: 'text/plain'}));
        page.element('a', {href: address, download: name}).click();
        setTimeout(() => URL.revokeObjectURL(address), 1000);
    },

    // "1 token", "2 tokens", "1,234 tokens"
    count(number, noun) {
        return `${number.toLocaleString('en')} ${noun}${number === 1 ? '' : 's'}`;
    },
};

// Escape stops what is being written: it clicks the visible Stop button.
document.addEventListener('keydown', event => {
    if (event.key !== 'Escape') return;
    for (const button of document.querySelectorAll('#stop, #chat-stop, #compare-stop')) {
        if (button.offsetParent) button.click();
    }
});

// another link in the address bar opens like the first one
window.onhashchange = () => location.reload();
