package modbus

import (
	"fmt"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/device"
)

func TestPlan(t *testing.T) {
	at := func(table device.ModbusTable, addr, count uint16) *codec {
		name := fmt.Sprintf("%s%d", table, addr)
		return &codec{prop: &device.Property{Name: name}, table: table, addr: addr, count: count}
	}
	h, c := device.HoldingRegister, device.Coil
	for _, test := range []struct {
		name   string
		codecs []*codec
		alone  string
		tight  string
		want   string
	}{
		{"adjacent", []*codec{at(h, 2, 2), at(h, 0, 2), nil, at(h, 4, 1)}, "", "", "holdingRegister 0+5"},
		{"gap of 8", []*codec{at(h, 0, 1), at(h, 9, 1)}, "", "", "holdingRegister 0+10"},
		{"gap of 9", []*codec{at(h, 0, 1), at(h, 10, 1)}, "", "", "holdingRegister 0+1, holdingRegister 10+1"},
		{"overlap", []*codec{at(h, 0, 4), at(h, 1, 1), at(h, 2, 1)}, "", "", "holdingRegister 0+4"},
		{"tables", []*codec{at(h, 0, 1), at(c, 0, 1), at(device.InputRegister, 1, 1)}, "", "", "coil 0+1, holdingRegister 0+1, inputRegister 1+1"},
		{"125 registers", []*codec{at(h, 0, 124), at(h, 124, 1)}, "", "", "holdingRegister 0+125"},
		{"126 registers", []*codec{at(h, 0, 124), at(h, 124, 2)}, "", "", "holdingRegister 0+124, holdingRegister 124+2"},
		{"bits", []*codec{at(c, 0, 1), at(c, 128, 1), at(c, 300, 1)}, "", "", "coil 0+129, coil 300+1"},
		{"alone", []*codec{at(h, 0, 1), at(h, 1, 1), at(h, 2, 1)}, "holdingRegister1", "", "holdingRegister 0+1, holdingRegister 1+1, holdingRegister 2+1"},
		{"tight", []*codec{at(h, 0, 1), at(h, 1, 1), at(h, 3, 1)}, "", "holdingRegister1", "holdingRegister 0+2, holdingRegister 3+1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newManners()
			m.alone[test.alone], m.tight[test.tight] = true, true
			var got []string
			for _, b := range plan(test.codecs, m) {
				got = append(got, fmt.Sprintf("%s %d+%d", b.table, b.addr, b.count))
			}
			if s := strings.Join(got, ", "); s != test.want {
				t.Errorf("got  %s\nwant %s", s, test.want)
			}
		})
	}
}
