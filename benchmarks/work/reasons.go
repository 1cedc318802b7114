package work

// Reasons say why a goal is not reached, by its ID, for as long as it is not: what the profile shows, and why it stays as it
// is. The report puts them beside the figure.
var Reasons = map[string]string{}
