package store

// For the tests of the record's form.
var (
	DecodeRetained = decodeRetained
	EncodeRetained = encodeRetained
)
