package survey

// CheckTable is checkTable for tests.
var CheckTable = checkTable
