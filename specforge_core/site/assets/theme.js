// Before the first paint: the reader's own choice, if there is one; otherwise the system's holds.
(function () {
  try {
    const chosen = localStorage.getItem("theme");
    if (chosen) document.documentElement.dataset.theme = chosen;
  } catch { /* A browser that keeps nothing for local files. */ }
})();
