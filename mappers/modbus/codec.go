package modbus

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

// Limits of one request (MODBUS Application Protocol V1.1b3, sections 6.1, 6.3
// and 6.12).
const (
	maxReadRegisters  = 125
	maxReadBits       = 2000
	maxWriteRegisters = 123
)

// codec turns the registers or the bit of one property into its value and back.
type codec struct {
	prop  *device.Property
	table device.ModbusTable
	addr  uint16
	count uint16 // registers, or 1 for a bit

	raw           device.Type // of the number in the registers
	swapBytes     bool        // within each register: BADC, DCBA
	swapWords     bool        // last register first: CDAB, DCBA
	scale, offset *big.Rat    // nil where there is none
}

// newCodec checks where a property lies; the error is a configuration fault.
func newCodec(p *device.Property) (*codec, error) {
	m := p.Modbus
	if m == nil {
		return nil, driver.ConfigFault("property %s: its modbus block is missing", p.Name)
	}
	refuse := func(format string, args ...any) (*codec, error) {
		return nil, driver.ConfigFault("property %s: "+format, append([]any{p.Name}, args...)...)
	}
	if !p.Type.Valid() {
		return refuse("no type %q", p.Type)
	}
	c := &codec{prop: p, table: m.Table, addr: m.Address, count: 1, raw: p.Type}
	switch m.Table {
	case device.Coil, device.DiscreteInput:
		if p.Type != device.Bool {
			return refuse("a %s holds a bool, not %s", m.Table, p.Type)
		}
		if m.Order != "" || m.Scale != nil || m.Offset != nil || m.Raw != "" || m.Length != 0 {
			return refuse("order, scale, offset, raw and length are for registers, not for a %s", m.Table)
		}
	case device.InputRegister, device.HoldingRegister:
		if err := c.registers(); err != nil {
			return refuse("%w", err)
		}
	default:
		return refuse("no table %q: want coil, discreteInput, inputRegister or holdingRegister", m.Table)
	}
	if p.Access.Writable() && (m.Table == device.DiscreteInput || m.Table == device.InputRegister) {
		return refuse("a %s can only be read, but access is %s", m.Table, p.Access)
	}
	if p.Access.Writable() && c.count > maxWriteRegisters {
		return refuse("%d registers cannot be written at once: want at most %d", c.count, maxWriteRegisters)
	}
	if int(c.addr)+int(c.count) > 1<<16 {
		return refuse("%d registers from address %d reach beyond 65535", c.count, c.addr)
	}
	return c, nil
}

func (c *codec) registers() error {
	p, m := c.prop, c.prop.Modbus
	switch m.Order {
	case "", "ABCD":
	case "CDAB":
		c.swapWords = true
	case "BADC":
		c.swapBytes = true
	case "DCBA":
		c.swapWords, c.swapBytes = true, true
	default:
		return fmt.Errorf("no order %q: want ABCD, CDAB, BADC or DCBA", m.Order)
	}
	if m.Raw != "" {
		if !m.Raw.Numeric() || !p.Type.Numeric() {
			return fmt.Errorf("raw %q with type %s: both must be numbers", m.Raw, p.Type)
		}
		c.raw = m.Raw
	}
	var err error
	if c.scale, err = factor("scale", m.Scale); err != nil {
		return err
	}
	if c.offset, err = factor("offset", m.Offset); err != nil {
		return err
	}
	if (c.scale != nil || c.offset != nil) && !p.Type.Numeric() {
		return fmt.Errorf("scale and offset are for numbers, not for %s", p.Type)
	}
	if c.scale != nil && c.scale.Sign() == 0 {
		return fmt.Errorf("scale 0 makes every value the same")
	}
	switch c.raw {
	case device.String, device.Bytes, device.JSON:
		if m.Length == 0 || m.Length > maxReadRegisters {
			return fmt.Errorf("length %d: a %s wants 1 to %d registers", m.Length, p.Type, maxReadRegisters)
		}
		if c.swapWords {
			return fmt.Errorf("order %s: a %s knows ABCD and BADC only", m.Order, p.Type)
		}
		c.count = m.Length
	case device.Int32, device.Uint32, device.Float32:
		c.count = 2
	case device.Int64, device.Uint64, device.Float64:
		c.count = 4
	}
	if m.Length != 0 && m.Length != c.count {
		return fmt.Errorf("length %d: a %s has %d registers", m.Length, c.raw, c.count)
	}
	return nil
}

// factor reads a scale or offset exactly. The bounds keep big arithmetic cheap.
func factor(what string, n *json.Number) (*big.Rat, error) {
	if n == nil {
		return nil, nil
	}
	f, err := strconv.ParseFloat(n.String(), 64)
	if err != nil || len(n.String()) > 40 || math.Abs(f) > 1e30 || f != 0 && math.Abs(f) < 1e-30 {
		return nil, fmt.Errorf("%s %.40q: want a number between 1e-30 and 1e30", what, n.String())
	}
	r, ok := new(big.Rat).SetString(n.String())
	if !ok {
		return nil, fmt.Errorf("%s %.40q: want a number", what, n.String())
	}
	return r, nil
}

// bits tells whether the property lies in a table of bits.
func (c *codec) bits() bool { return c.table == device.Coil || c.table == device.DiscreteInput }

func badValue(format string, args ...any) error {
	return &driver.Fault{Quality: payload.QualityValue, Err: fmt.Errorf(format, args...)}
}

// order puts registers as they travel into big-endian order, or back: both
// swaps undo themselves.
func (c *codec) order(b []byte) []byte {
	b = slices.Clone(b)
	if c.swapWords {
		for i, j := 0, len(b)-2; i < j; i, j = i+2, j-2 {
			b[i], b[i+1], b[j], b[j+1] = b[j], b[j+1], b[i], b[i+1]
		}
	}
	if c.swapBytes {
		for i := 0; i+1 < len(b); i += 2 {
			b[i], b[i+1] = b[i+1], b[i]
		}
	}
	return b
}

// decode reads the value from 2×count bytes as they travelled.
func (c *codec) decode(registers []byte) (any, error) {
	if len(registers) != 2*int(c.count) {
		return nil, malformed("%d bytes for %d registers", len(registers), c.count)
	}
	b := c.order(registers)
	switch c.raw {
	case device.Bool:
		switch v := binary.BigEndian.Uint16(b); v {
		case 0, 1:
			return v == 1, nil
		default:
			return nil, badValue("register %d holds %d: a bool wants 0 or 1", c.addr, v)
		}
	case device.Bytes:
		return b, nil
	case device.String:
		b = untilNUL(b)
		if !utf8.Valid(b) {
			return nil, badValue("register %d: the text is not UTF-8", c.addr)
		}
		return string(b), nil
	case device.JSON:
		var out bytes.Buffer
		if err := json.Compact(&out, untilNUL(b)); err != nil {
			return nil, badValue("register %d: the text is not JSON", c.addr)
		}
		return json.RawMessage(out.Bytes()), nil
	}
	raw := c.rawNumber(b)
	switch v := raw.(type) { // types of 8 bits take a whole register and may overflow
	case int64:
		if c.raw == device.Int8 && (v < math.MinInt8 || v > math.MaxInt8) {
			return nil, badValue("register %d holds %d, which does not fit %s", c.addr, v, c.raw)
		}
	case uint64:
		if c.raw == device.Uint8 && v > math.MaxUint8 {
			return nil, badValue("register %d holds %d, which does not fit %s", c.addr, v, c.raw)
		}
	}
	return c.fromRaw(raw)
}

func untilNUL(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}

// rawNumber gives int64, uint64 or float64.
func (c *codec) rawNumber(b []byte) any {
	switch c.raw {
	case device.Int8, device.Int16:
		return int64(int16(binary.BigEndian.Uint16(b)))
	case device.Uint8, device.Uint16:
		return uint64(binary.BigEndian.Uint16(b))
	case device.Int32:
		return int64(int32(binary.BigEndian.Uint32(b)))
	case device.Uint32:
		return uint64(binary.BigEndian.Uint32(b))
	case device.Int64:
		return int64(binary.BigEndian.Uint64(b))
	case device.Uint64:
		return binary.BigEndian.Uint64(b)
	case device.Float32:
		return float64(math.Float32frombits(binary.BigEndian.Uint32(b)))
	default: // float64, the last of the numeric types
		return math.Float64frombits(binary.BigEndian.Uint64(b))
	}
}

// fromRaw applies scale and offset exactly. An integer property takes the
// nearest whole number, halves away from zero.
func (c *codec) fromRaw(v any) (any, error) {
	p := c.prop
	if f, ok := v.(float64); ok {
		if math.IsNaN(f) || math.IsInf(f, 0) {
			return nil, badValue("register %d holds %v", c.addr, f)
		}
		if p.Type.Float() && c.scale == nil && c.offset == nil {
			return c.fitFloat(f)
		}
	}
	r := exact(v, c.raw)
	if c.scale != nil {
		r.Mul(r, c.scale)
	}
	if c.offset != nil {
		r.Add(r, c.offset)
	}
	if p.Type.Float() {
		f, _ := r.Float64()
		return c.fitFloat(f)
	}
	i, ok := integer(p.Type, nearest(r))
	if !ok {
		return nil, badValue("register %d gives %s, which does not fit %s", c.addr, r.FloatString(3), p.Type)
	}
	return i, nil
}

func (c *codec) fitFloat(f float64) (any, error) {
	if c.prop.Type == device.Float32 && tooLarge(f) || math.IsInf(f, 0) {
		return nil, badValue("register %d gives %v, which does not fit %s", c.addr, f, c.prop.Type)
	}
	return f, nil
}

// tooLarge tells whether the number rounds beyond the largest float32.
func tooLarge(f float64) bool { return math.IsInf(float64(float32(f)), 0) }

// exact gives the number as a fraction: floats by the shortest decimal that
// means them, so that 21.5 × 0.1 is what a person expects.
func exact(v any, t device.Type) *big.Rat {
	switch v := v.(type) {
	case int64:
		return new(big.Rat).SetInt64(v)
	case uint64:
		return new(big.Rat).SetUint64(v)
	case float64:
		bits := 64
		if t == device.Float32 {
			bits = 32
		}
		r, _ := new(big.Rat).SetString(strconv.FormatFloat(v, 'g', -1, bits))
		return r
	}
	return new(big.Rat)
}

// nearest rounds to the nearest integer, halves away from zero.
func nearest(r *big.Rat) *big.Int {
	n := new(big.Int).Abs(r.Num())
	n.Lsh(n, 1).Add(n, r.Denom())
	n.Quo(n, new(big.Int).Lsh(r.Denom(), 1))
	if r.Sign() < 0 {
		n.Neg(n)
	}
	return n
}

// integer gives the native value of an integer type, if it fits.
func integer(t device.Type, i *big.Int) (any, bool) {
	// The limits are those of package device: its decoder is the one judge.
	p := device.Property{Type: t}
	v, err := p.Decode(json.RawMessage(i.String()))
	return v, err == nil
}

// encode gives the registers for a value, as they travel. The error is a
// *[device.ValueError].
func (c *codec) encode(v any) ([]byte, error) {
	b := make([]byte, 2*c.count)
	switch c.raw {
	case device.Bool:
		if v == true {
			b[1] = 1
		}
	case device.String, device.Bytes, device.JSON:
		text, err := c.text(v)
		if err != nil {
			return nil, err
		}
		copy(b, text)
	default:
		if err := c.number(b, v); err != nil {
			return nil, err
		}
	}
	return c.order(b), nil
}

func (c *codec) text(v any) ([]byte, error) {
	var text []byte
	switch v := v.(type) {
	case string:
		text = []byte(v)
	case []byte:
		text = v
	case json.RawMessage:
		text = v
	}
	if len(text) > 2*int(c.count) {
		return nil, device.Refuse(device.ReasonRange, "property %s: %d bytes do not fit %d registers", c.prop.Name, len(text), c.count)
	}
	if c.raw == device.String && bytes.IndexByte(text, 0) >= 0 {
		return nil, device.Refuse(device.ReasonType, "property %s: a zero byte would end the text", c.prop.Name)
	}
	return text, nil
}

// number undoes offset and scale and writes the raw number: the nearest one
// where the value lies between two.
func (c *codec) number(b []byte, v any) error {
	refuse := device.Refuse(device.ReasonRange, "property %s: %v does not fit the registers' %s", c.prop.Name, v, c.raw)
	if c.raw.Float() {
		f, ok := v.(float64)
		if !ok || c.scale != nil || c.offset != nil {
			f, _ = c.unscaled(v).Float64()
		}
		if math.IsInf(f, 0) || c.raw == device.Float32 && tooLarge(f) {
			return refuse
		}
		if c.raw == device.Float32 {
			binary.BigEndian.PutUint32(b, math.Float32bits(float32(f)))
		} else {
			binary.BigEndian.PutUint64(b, math.Float64bits(f))
		}
		return nil
	}
	raw, ok := integer(c.raw, nearest(c.unscaled(v)))
	if !ok {
		return refuse
	}
	var u uint64
	switch raw := raw.(type) {
	case int64:
		u = uint64(raw) // two's complement, cut to the registers below
	case uint64:
		u = raw
	}
	switch c.count {
	case 1:
		binary.BigEndian.PutUint16(b, uint16(u))
	case 2:
		binary.BigEndian.PutUint32(b, uint32(u))
	default:
		binary.BigEndian.PutUint64(b, u)
	}
	return nil
}

func (c *codec) unscaled(v any) *big.Rat {
	r := exact(v, c.prop.Type)
	if c.offset != nil {
		r.Sub(r, c.offset)
	}
	if c.scale != nil {
		r.Quo(r, c.scale)
	}
	return r
}
