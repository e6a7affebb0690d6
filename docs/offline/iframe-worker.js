/* Search on a site opened from disk. Browsers run no worker from a file, so the search script runs in a hidden frame,
   which takes and gives messages as a worker does. It begins when the reader turns to the search field, so that pages
   open at once. On a server this file does nothing. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const field = document.querySelector("[data-md-component=search-query]");
      this.inner = new Promise((resolve) => {
        field.addEventListener("focus", () => this.start(url, resolve), { once: true });
      });
    }

    start(url, resolve) {
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inner.document.createElement("script");
      script.addEventListener("load", () => resolve(inner));
      script.src = url;
      inner.document.body.append(script);
    }

    postMessage(data) {
      this.inner.then((inner) => inner.dispatchEvent(new inner.MessageEvent("message", { data })));
    }
  };
}
