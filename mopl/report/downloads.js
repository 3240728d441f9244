"use strict";
// Files made in the page, the chart as PNG among them: nothing is sent anywhere.
const downloads = (() => {
  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }
  // The chart as it is shown, with the colours that the style sheet gives it now, twice as fine.
  async function png(svg) {
    const box = svg.viewBox.baseVal, copy = svg.cloneNode(true);
    const nodes = [svg, ...svg.querySelectorAll("*")], copies = [copy, ...copy.querySelectorAll("*")];
    nodes.forEach((node, i) => {
      const style = getComputedStyle(node);
      for (const name of ["fill", "stroke", "font", "opacity", "paint-order", "stroke-width", "stroke-linejoin"]) {
        copies[i].style.setProperty(name, style.getPropertyValue(name));
      }
    });
    const paper = figures.draw("rect", { width: box.width, height: box.height });
    paper.style.fill = getComputedStyle(document.querySelector(".card")).backgroundColor;
    copy.prepend(paper);
    copy.setAttribute("xmlns", figures.SVG);
    copy.setAttribute("width", 2 * box.width);
    copy.setAttribute("height", 2 * box.height);
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [2 * box.width, 2 * box.height];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }
  return { save, png };
})();
