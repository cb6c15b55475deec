// What the browser does without the server. Each tab adds its functions to `page`, and its Python
// file names them: js="page.someFunction".
window.page = {};
