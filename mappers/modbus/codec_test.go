package modbus

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

// property reads a property as a DeviceModel has it, on holding register 0.
func property(t testing.TB, js string) *device.Property {
	t.Helper()
	p := &device.Property{Name: "x", Access: device.ReadWrite, Modbus: &device.ModbusProperty{Table: device.HoldingRegister}}
	if err := json.Unmarshal([]byte(js), p); err != nil {
		t.Fatalf("%s: %v", js, err)
	}
	return p
}

func registers(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestCodec goes both ways: the registers give the value, the value the registers.
func TestCodec(t *testing.T) {
	for _, c := range []struct {
		prop string
		regs string
		want any
	}{
		{`{"type":"bool"}`, "0001", true},
		{`{"type":"bool"}`, "0000", false},
		{`{"type":"bool","modbus":{"order":"BADC"}}`, "0100", true},
		{`{"type":"int8"}`, "ff80", int64(-128)},
		{`{"type":"uint8"}`, "00ff", uint64(255)},
		{`{"type":"int16"}`, "8000", int64(-32768)},
		{`{"type":"uint16"}`, "ffff", uint64(65535)},
		{`{"type":"uint16","modbus":{"order":"CDAB"}}`, "1234", uint64(0x1234)},
		{`{"type":"uint16","modbus":{"order":"DCBA"}}`, "3412", uint64(0x1234)},
		{`{"type":"int32"}`, "ffff ffff", int64(-1)},
		{`{"type":"uint32"}`, "1234 5678", uint64(0x12345678)},
		{`{"type":"uint32","modbus":{"order":"ABCD"}}`, "1234 5678", uint64(0x12345678)},
		{`{"type":"uint32","modbus":{"order":"CDAB"}}`, "5678 1234", uint64(0x12345678)},
		{`{"type":"uint32","modbus":{"order":"BADC"}}`, "3412 7856", uint64(0x12345678)},
		{`{"type":"uint32","modbus":{"order":"DCBA"}}`, "7856 3412", uint64(0x12345678)},
		{`{"type":"int64"}`, "8000 0000 0000 0000", int64(math.MinInt64)},
		{`{"type":"uint64"}`, "ffff ffff ffff ffff", uint64(math.MaxUint64)},
		{`{"type":"uint64"}`, "0123 4567 89ab cdef", uint64(0x0123456789abcdef)},
		{`{"type":"uint64","modbus":{"order":"CDAB"}}`, "cdef 89ab 4567 0123", uint64(0x0123456789abcdef)},
		{`{"type":"uint64","modbus":{"order":"BADC"}}`, "2301 6745 ab89 efcd", uint64(0x0123456789abcdef)},
		{`{"type":"uint64","modbus":{"order":"DCBA"}}`, "efcd ab89 6745 2301", uint64(0x0123456789abcdef)},
		{`{"type":"float32"}`, "41ac 0000", 21.5},
		{`{"type":"float32","modbus":{"order":"CDAB"}}`, "0000 41ac", 21.5},
		{`{"type":"float32","modbus":{"order":"BADC"}}`, "ac41 0000", 21.5},
		{`{"type":"float32","modbus":{"order":"DCBA"}}`, "0000 ac41", 21.5},
		{`{"type":"float64"}`, "4035 8000 0000 0000", 21.5},
		{`{"type":"float64","modbus":{"order":"DCBA"}}`, "0000 0000 0080 3540", 21.5},
		{`{"type":"string","modbus":{"length":3}}`, "6869 2100 0000", "hi!"},
		{`{"type":"string","modbus":{"length":2}}`, "c3a9 c3a8", "éè"},
		{`{"type":"string","modbus":{"length":2,"order":"BADC"}}`, "6968 0021", "hi!"},
		{`{"type":"bytes","modbus":{"length":2}}`, "0001 ff00", []byte{0, 1, 255, 0}},
		{`{"type":"json","modbus":{"length":4}}`, "7b22 6122 3a31 7d00", json.RawMessage(`{"a":1}`)},
		// Scale and offset are exact: 215 × 0.1 is 21.5, not 21.500000000000004.
		{`{"type":"float64","modbus":{"raw":"int16","scale":0.1}}`, "00d7", 21.5},
		{`{"type":"float64","modbus":{"raw":"int16","scale":0.1}}`, "0003", 0.3},
		{`{"type":"float64","modbus":{"raw":"int16","scale":0.1,"offset":-40}}`, "0000", -40.0},
		{`{"type":"float64","modbus":{"raw":"uint16","scale":0.01,"offset":0.005}}`, "0001", 0.015},
		{`{"type":"float32","modbus":{"raw":"uint16","scale":0.1}}`, "0001", 0.1},
		{`{"type":"float64","modbus":{"raw":"float32","scale":10}}`, "3dcccccd", 1.0},
		{`{"type":"int32","modbus":{"raw":"int16","scale":100}}`, "ff9c", int64(-10000)},
		{`{"type":"uint64","modbus":{"raw":"uint64","offset":1}}`, "ffff ffff ffff fffe", uint64(math.MaxUint64)},
		{`{"type":"int64","modbus":{"raw":"uint32","offset":-4294967296}}`, "0000 0000", int64(-4294967296)},
		{`{"type":"float64","modbus":{"raw":"uint16"}}`, "0028", 40.0},
	} {
		codec, err := newCodec(property(t, c.prop))
		if err != nil {
			t.Errorf("%s: %v", c.prop, err)
			continue
		}
		regs := registers(t, c.regs)
		got, err := codec.decode(regs)
		if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
			t.Errorf("%s decode %s: %v (-want +got)\n%s", c.prop, c.regs, err, diff)
		}
		back, err := codec.encode(c.want)
		if err != nil || !bytes.Equal(back, regs) {
			t.Errorf("%s encode %v: got %x, %v; want %s", c.prop, c.want, back, err, c.regs)
		}
	}
}

func TestCodecReadsNoValue(t *testing.T) {
	for _, c := range []struct{ prop, regs string }{
		{`{"type":"bool"}`, "0002"},
		{`{"type":"int8"}`, "0080"},
		{`{"type":"uint8"}`, "0100"},
		{`{"type":"float32"}`, "7fc0 0000"}, // NaN
		{`{"type":"float64"}`, "7ff0 0000 0000 0000"},
		{`{"type":"float32","modbus":{"raw":"float64"}}`, "7fe0 0000 0000 0000"},
		{`{"type":"uint16","modbus":{"raw":"int16"}}`, "ffff"},
		{`{"type":"int8","modbus":{"raw":"int16","scale":10}}`, "0064"},
		{`{"type":"int32","modbus":{"raw":"float32"}}`, "7f80 0000"},
		{`{"type":"string","modbus":{"length":1}}`, "ff41"},
		{`{"type":"json","modbus":{"length":1}}`, "7b00"},
	} {
		codec, err := newCodec(property(t, c.prop))
		if err != nil {
			t.Errorf("%s: %v", c.prop, err)
			continue
		}
		v, err := codec.decode(registers(t, c.regs))
		var f *driver.Fault
		if !errors.As(err, &f) || f.Quality != payload.QualityValue {
			t.Errorf("%s decode %s: got %v, %v; want %s", c.prop, c.regs, v, err, payload.QualityValue)
		}
	}
}

func TestCodecRoundsAndRefusesOnWrite(t *testing.T) {
	for _, c := range []struct {
		prop  string
		value any
		regs  string // empty: refused
	}{
		{`{"type":"float64","modbus":{"raw":"int16","scale":0.1}}`, 21.54, "00d7"},
		{`{"type":"float64","modbus":{"raw":"int16","scale":0.1}}`, 21.55, "00d8"},
		{`{"type":"float64","modbus":{"raw":"int16","scale":0.1}}`, -21.55, "ff28"},
		{`{"type":"float64","modbus":{"raw":"int16","scale":0.1}}`, 3276.7, "7fff"},
		{`{"type":"float64","modbus":{"raw":"int16","scale":0.1}}`, 3276.8, ""},
		{`{"type":"int32","modbus":{"raw":"uint16"}}`, int64(-1), ""},
		{`{"type":"float64","modbus":{"raw":"float32"}}`, 1e39, ""},
		{`{"type":"string","modbus":{"length":1}}`, "abc", ""},
		{`{"type":"string","modbus":{"length":2}}`, "a\x00b", ""},
		{`{"type":"bytes","modbus":{"length":1}}`, []byte{1}, "0100"},
	} {
		codec, err := newCodec(property(t, c.prop))
		if err != nil {
			t.Errorf("%s: %v", c.prop, err)
			continue
		}
		got, err := codec.encode(c.value)
		if c.regs == "" {
			var v *device.ValueError
			if !errors.As(err, &v) {
				t.Errorf("%s encode %v: got %x, %v; want it refused", c.prop, c.value, got, err)
			}
		} else if err != nil || !bytes.Equal(got, registers(t, c.regs)) {
			t.Errorf("%s encode %v: got %x, %v; want %s", c.prop, c.value, got, err, c.regs)
		}
	}
}

func TestConfigThatCannotWork(t *testing.T) {
	for _, c := range []struct{ prop, want string }{
		{`{"type":"number"}`, "no type"},
		{`{"type":"int16","modbus":{"table":"holding"}}`, "no table"},
		{`{"type":"int16","modbus":{"table":"coil"}}`, "holds a bool"},
		{`{"type":"bool","modbus":{"table":"coil","scale":2}}`, "for registers"},
		{`{"type":"int32","modbus":{"order":"BDAC"}}`, "no order"},
		{`{"type":"string"}`, "length 0"},
		{`{"type":"string","modbus":{"length":126}}`, "1 to 125"},
		{`{"type":"string","modbus":{"length":124}}`, "at most 123"},
		{`{"type":"string","modbus":{"length":2,"order":"CDAB"}}`, "ABCD and BADC only"},
		{`{"type":"int32","modbus":{"length":1}}`, "has 2 registers"},
		{`{"type":"int32","modbus":{"address":65535}}`, "beyond 65535"},
		{`{"type":"int16","modbus":{"scale":0}}`, "scale 0"},
		{`{"type":"int16","modbus":{"scale":1e99}}`, "between"},
		{`{"type":"int16","modbus":{"raw":"string"}}`, "must be numbers"},
		{`{"type":"bool","modbus":{"offset":1}}`, "for numbers"},
		{`{"type":"int16","modbus":{"table":"inputRegister"}}`, "only be read"},
		{`{"type":"bool","modbus":{"table":"discreteInput"}}`, "only be read"},
	} {
		_, err := newCodec(property(t, c.prop))
		var f *driver.Fault
		if !errors.As(err, &f) || f.Quality != payload.QualityConfig || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v; want a configuration fault that says %q", c.prop, err, c.want)
		}
	}
}

// FuzzCodec: whatever registers decode to, writing it back and reading it again
// gives the same value.
func FuzzCodec(f *testing.F) {
	f.Add(uint8(0), uint8(0), "0.1", []byte{0, 215, 0, 0, 0, 0, 0, 0})
	f.Add(uint8(9), uint8(3), "1", []byte{0x41, 0xac, 0, 0, 0, 0, 0, 0})
	types := []device.Type{device.Int8, device.Int16, device.Int32, device.Int64, device.Uint8, device.Uint16,
		device.Uint32, device.Uint64, device.Float32, device.Float64, device.Bool, device.String, device.Bytes, device.JSON}
	f.Fuzz(func(t *testing.T, typ, order uint8, scale string, b []byte) {
		p := &device.Property{Name: "x", Type: types[int(typ)%len(types)], Access: device.ReadWrite,
			Modbus: &device.ModbusProperty{Table: device.HoldingRegister, Order: []string{"ABCD", "CDAB", "BADC", "DCBA"}[order%4]}}
		if n := json.Number(scale); scale != "1" && json.Valid([]byte(scale)) && p.Type.Integer() {
			// An integer with a scale is read through float64, as models do.
			p.Modbus.Raw, p.Type, p.Modbus.Scale = p.Type, device.Float64, &n
		}
		if len(b) < 8 {
			return
		}
		if p.Type == device.String || p.Type == device.Bytes || p.Type == device.JSON {
			p.Modbus.Length = 4
		}
		c, err := newCodec(p)
		if err != nil {
			return
		}
		v, err := c.decode(b[:2*c.count])
		if err != nil {
			return
		}
		if x, ok := v.(float64); ok && c.scale != nil && math.Abs(x) > 1<<52*1e-9 {
			return // float64 may not tell neighbouring raw numbers apart
		}
		back, err := c.encode(v)
		if err != nil {
			t.Fatalf("%+v: %v was read but cannot be written: %v", p.Modbus, v, err)
		}
		again, err := c.decode(back)
		if err != nil || !p.Type.Equal(v, again) {
			t.Fatalf("%+v: %v became %v, %v", p.Modbus, v, again, err)
		}
	})
}
