// Numbers and dates for people.

const GROUPED = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric", timeZone: "UTC" });
const MINUTE = new Intl.DateTimeFormat("en-GB", {
  day: "numeric",
  month: "short",
  year: "numeric",
  hour: "2-digit",
  minute: "2-digit",
  hourCycle: "h23",
  timeZone: "UTC",
});

// Three significant digits, or all before the point: 0.0123, 4.56, 78.9, 1,234, 235 k, 2.35 M.
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${significant(value / 1e6)} M`;
  if (size >= 1e5) return `${significant(value / 1000)} k`;
  if (size >= 1000) return GROUPED.format(value);
  return significant(value);
}

function significant(value) {
  if (value === 0) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(digits, 8));
}

export const count = (amount, noun) => `${amount} ${noun}${amount === 1 ? "" : "s"}`;

// A probability of error: one digit says enough.
export const pValue = (p) => (p < 0.001 ? "< 0.001" : String(Number(p.toPrecision(1))));

export const percent = (share, digits = 0) => `${(share * 100).toFixed(digits)} %`;

// A probability that may not be known.
export const chance = (probability) => (probability === null ? "unknown" : percent(probability));

// A change with its sign, a true minus and at most one digit after the point: +3.2 %, −12 %.
export function relative(share) {
  const size = Math.abs(share * 100);
  return `${share < 0 ? "−" : "+"}${size < 10 ? size.toFixed(1) : size.toFixed(0)} %`;
}

// Seconds below one in milliseconds; the unit "1" has no name.
export function inUnit(found, unit) {
  if (unit === "1") return { found, unit: "" };
  if (unit !== "s" || found.value >= 1) return { found, unit };
  const thousand = (value) => (value === null ? null : value * 1000);
  const ends = { low: thousand(found.low), high: thousand(found.high) };
  return { found: { ...found, value: thousand(found.value), ...ends }, unit: "ms" };
}

// {value, low, high} with its interval, as text.
export function estimate(measured, measuredIn) {
  if (!measured) return "–";
  const { found, unit } = inUnit(measured, measuredIn);
  return `${number(found.value)} ${unit}`.trim() + interval(found);
}

export function interval(found) {
  if (found?.refused) return " (no interval)";
  if (!found || found.low === null || found.high === null) return "";
  return ` (${number(found.low)} to ${number(found.high)})`;
}

export const day = (iso) => DAY.format(new Date(iso));
export const minute = (iso) => `${MINUTE.format(new Date(iso))} UTC`;

export function ago(iso, now = Date.now()) {
  const seconds = Math.max(0, (now - new Date(iso).getTime()) / 1000);
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129_600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86_400)} days ago`;
}

export function bytes(size) {
  const step = Math.min(4, Math.max(0, Math.floor(Math.log2(Math.max(size, 1)) / 10)));
  return `${significant(size / 1024 ** step)} ${["B", "KiB", "MiB", "GiB", "TiB"][step]}`;
}

// Text for Plotly, which reads a few tags and entities in the strings that it draws.
export const escaped = (text) =>
  String(text).replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);
