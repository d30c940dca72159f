package device

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"strconv"
)

// Reason classifies why a value was refused. It is the word that travels in a
// twin's "err" and in metrics.
type Reason string

// The reasons for which a value is refused.
const (
	ReasonType     Reason = "type"
	ReasonRange    Reason = "range"
	ReasonEnum     Reason = "enum"
	ReasonAccess   Reason = "access"
	ReasonProperty Reason = "property"
	ReasonDevice   Reason = "device"
	ReasonPayload  Reason = "payload"
)

// ValueError says why a value was refused.
type ValueError struct {
	Reason Reason
	Detail string // a sentence for a person
}

func (e *ValueError) Error() string { return e.Detail }

// Refuse makes a ValueError.
func Refuse(r Reason, format string, args ...any) *ValueError {
	return &ValueError{Reason: r, Detail: fmt.Sprintf(format, args...)}
}

// maxSafe is the largest integer that every JSON reader keeps: 2^53.
const maxSafe = 1 << 53

var limits = map[Type]struct {
	bits   int
	signed bool
}{
	Int8: {8, true}, Int16: {16, true}, Int32: {32, true}, Int64: {64, true},
	Uint8: {8, false}, Uint16: {16, false}, Uint32: {32, false}, Uint64: {64, false},
}

// Integer tells whether the type is one of the integers.
func (t Type) Integer() bool { _, ok := limits[t]; return ok }

// Float tells whether the type is float32 or float64.
func (t Type) Float() bool { return t == Float32 || t == Float64 }

// Numeric tells whether the type has an order, so that min, max and deadband apply.
func (t Type) Numeric() bool { return t.Integer() || t.Float() }

// Valid tells whether the type is one of the property types.
func (t Type) Valid() bool {
	switch t {
	case Bool, String, Bytes, JSON:
		return true
	}
	return t.Numeric()
}

// Decode reads a value from its JSON form and checks it against the property's
// type, range, enum and length (not its access). It gives bool, int64, uint64,
// float64, string, []byte or json.RawMessage, by type. Integers may come as
// strings (that is how those above 2^53 travel); null is refused. The error is
// a *[ValueError].
func (p *Property) Decode(raw json.RawMessage) (any, error) {
	v, err := p.Type.decode(raw)
	if err != nil {
		err.Detail = "property " + p.Name + ": " + err.Detail
		return nil, err
	}
	if err := p.check(v); err != nil {
		err.Detail = "property " + p.Name + ": " + err.Detail
		return nil, err
	}
	return v, nil
}

// Check tests a native value against the property's range, enum and length.
func (p *Property) Check(v any) error {
	if err := p.check(v); err != nil {
		err.Detail = "property " + p.Name + ": " + err.Detail
		return err
	}
	return nil
}

func (t Type) decode(raw json.RawMessage) (any, *ValueError) {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || !json.Valid(raw) {
		return nil, Refuse(ReasonPayload, "%.64q is not JSON", raw)
	}
	if bytes.Equal(raw, []byte("null")) && t != JSON {
		return nil, Refuse(ReasonType, "null is not a %s", t)
	}
	text := string(raw)
	if raw[0] == '"' {
		if err := json.Unmarshal(raw, &text); err != nil {
			return nil, Refuse(ReasonPayload, "%.64q is not a JSON string: %v", raw, err)
		}
	}
	wrong := Refuse(ReasonType, "%.64s is not a %s", raw, t)
	switch {
	case t == JSON:
		var b bytes.Buffer
		if err := json.Compact(&b, raw); err != nil {
			return nil, Refuse(ReasonPayload, "%v", err)
		}
		return json.RawMessage(b.Bytes()), nil
	case t == Bool:
		if text == "true" || text == "false" {
			if raw[0] != '"' {
				return text == "true", nil
			}
		}
		return nil, wrong
	case t == String:
		if raw[0] != '"' {
			return nil, wrong
		}
		return text, nil
	case t == Bytes:
		if raw[0] != '"' {
			return nil, wrong
		}
		b, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, Refuse(ReasonType, "%.64s is not bytes: want base64", raw)
		}
		return b, nil
	case t.Integer():
		r, ok := parseNumber(text)
		if !ok {
			return nil, wrong
		}
		if !r.IsInt() {
			return nil, Refuse(ReasonType, "%.64s is not a whole number, as %s wants", raw, t)
		}
		l := limits[t]
		if l.signed {
			i := r.Num()
			if !i.IsInt64() || i.Int64() < -1<<(l.bits-1) || i.Int64() > 1<<(l.bits-1)-1 {
				return nil, Refuse(ReasonRange, "%.64s does not fit %s", raw, t)
			}
			return i.Int64(), nil
		}
		if !r.Num().IsUint64() || l.bits < 64 && r.Num().Uint64() > 1<<l.bits-1 {
			return nil, Refuse(ReasonRange, "%.64s does not fit %s", raw, t)
		}
		return r.Num().Uint64(), nil
	case t.Float():
		if raw[0] == '"' {
			return nil, wrong
		}
		f, err := strconv.ParseFloat(text, 64)
		if err != nil {
			if raw[0] == '-' || raw[0] >= '0' && raw[0] <= '9' { // a JSON number, so only its size is wrong
				return nil, Refuse(ReasonRange, "%.64s does not fit %s", raw, t)
			}
			return nil, wrong
		}
		if t == Float32 && math.IsInf(float64(float32(f)), 0) { // the largest float32 is written 3.4028235e38, a little above it
			return nil, Refuse(ReasonRange, "%.64s does not fit %s", raw, t)
		}
		return f, nil
	}
	return nil, Refuse(ReasonType, "no type %q", t)
}

// maxNumber bounds the text of a number before big arithmetic touches it:
// 1e999999999 would otherwise cost a gigabyte.
const maxNumber = 40

func parseNumber(s string) (*big.Rat, bool) {
	if len(s) == 0 || len(s) > maxNumber || !json.Valid([]byte(s)) || (s[0] != '-' && (s[0] < '0' || s[0] > '9')) {
		return nil, false
	}
	if f, err := strconv.ParseFloat(s, 64); err != nil || math.Abs(f) > 1e30 || f != 0 && math.Abs(f) < 1e-30 {
		return nil, false
	}
	return new(big.Rat).SetString(s)
}

func (p *Property) check(v any) *ValueError {
	if p.Type.Numeric() && (p.Min != nil || p.Max != nil) {
		r := p.Type.rat(v)
		if r == nil {
			return Refuse(ReasonRange, "%v is not a finite number", v)
		}
		for _, b := range []struct {
			bound *json.Number
			sign  int
			word  string
		}{{p.Min, -1, "below the minimum"}, {p.Max, 1, "above the maximum"}} {
			if b.bound == nil {
				continue
			}
			limit, ok := new(big.Rat).SetString(b.bound.String())
			if ok && r.Cmp(limit) == b.sign {
				return Refuse(ReasonRange, "%v is %s %s%s", v, b.word, b.bound, spaced(p.Unit))
			}
		}
	}
	if p.MaxLength > 0 {
		n := 0
		switch v := v.(type) {
		case string:
			n = len(v)
		case []byte:
			n = len(v)
		}
		if n > p.MaxLength {
			return Refuse(ReasonRange, "%d bytes are more than the %d allowed", n, p.MaxLength)
		}
	}
	if len(p.Enum) > 0 {
		for _, e := range p.Enum {
			if ev, err := p.Type.decode(e); err == nil && p.Type.Equal(ev, v) {
				return nil
			}
		}
		return Refuse(ReasonEnum, "%s is not one of %s", p.Type.Encode(v), enumList(p.Enum))
	}
	return nil
}

func enumList(e []json.RawMessage) string {
	b, _ := json.Marshal(e)
	return string(b)
}

func spaced(unit string) string {
	if unit == "" {
		return ""
	}
	return " " + unit
}

// rat gives a number as the fraction that its JSON form means: 0.1 is a tenth,
// not the binary fraction next to it, so that 0.1 is not above a maximum of 0.1.
// It is nil for NaN and infinities.
func (t Type) rat(v any) *big.Rat {
	switch v := v.(type) {
	case int64:
		return new(big.Rat).SetInt64(v)
	case uint64:
		return new(big.Rat).SetUint64(v)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil
		}
		bits := 64
		if t == Float32 {
			bits = 32
		}
		r, _ := new(big.Rat).SetString(strconv.FormatFloat(v, 'g', -1, bits))
		return r
	}
	return nil
}

// Encode writes a native value in its JSON form: integers beyond ±2^53 as
// strings, bytes as base64, NaN and infinities as null (say why in the
// quality). A value that is not native to the type becomes null.
func (t Type) Encode(v any) json.RawMessage {
	null := json.RawMessage("null")
	switch v := v.(type) {
	case bool:
		return strconv.AppendBool(nil, v)
	case int64:
		if v > maxSafe || v < -maxSafe {
			return json.RawMessage(strconv.Quote(strconv.FormatInt(v, 10)))
		}
		return strconv.AppendInt(nil, v, 10)
	case uint64:
		if v > maxSafe {
			return json.RawMessage(strconv.Quote(strconv.FormatUint(v, 10)))
		}
		return strconv.AppendUint(nil, v, 10)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return null
		}
		bits := 64
		if t == Float32 {
			bits = 32 // the shortest text that gives the same float32 back
			v = float64(float32(v))
		}
		b, err := json.Marshal(json.Number(strconv.FormatFloat(v, 'g', -1, bits)))
		if err != nil {
			return null
		}
		return b
	case string:
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false) // people read it
		if e.Encode(v) != nil {
			return null
		}
		return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	case []byte:
		return json.RawMessage(strconv.Quote(base64.StdEncoding.EncodeToString(v)))
	case json.RawMessage:
		return v
	}
	return null
}

// Equal tells whether two native values are the same. NaN equals NaN, so that
// it is not reported for ever.
func (t Type) Equal(a, b any) bool {
	switch x := a.(type) {
	case []byte:
		y, ok := b.([]byte)
		return ok && bytes.Equal(x, y)
	case json.RawMessage:
		y, ok := b.(json.RawMessage)
		return ok && bytes.Equal(x, y)
	case float64:
		y, ok := b.(float64)
		if t == Float32 {
			return ok && (float32(x) == float32(y) || math.IsNaN(x) && math.IsNaN(y))
		}
		return ok && (x == y || math.IsNaN(x) && math.IsNaN(y))
	}
	return a == b
}

// Changed tells whether now is worth reporting after last: different, and for
// numbers by at least the deadband.
func (p *Property) Changed(last, now any) bool {
	if p.Type.Equal(last, now) {
		return false
	}
	if p.Deadband <= 0 {
		return true
	}
	a, b := p.Type.rat(last), p.Type.rat(now)
	if a == nil || b == nil {
		return true
	}
	d := new(big.Rat).Sub(a, b)
	limit := new(big.Rat)
	limit.SetString(strconv.FormatFloat(p.Deadband, 'g', -1, 64))
	return d.Abs(d).Cmp(limit) >= 0
}
