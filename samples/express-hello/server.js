const express = require("express");

const app = express();
app.get("/", (_request, response) => {
  response.send(`Hello from machine ${process.env.DUNLIN_MACHINE_ID}, Node ${process.version}\n`);
});
const port = process.env.PORT || 8080;
app.listen(port, "0.0.0.0", () => console.log(`listening on ${port}`));
