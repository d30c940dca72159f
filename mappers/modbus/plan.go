package modbus

import (
	"cmp"
	"slices"

	"github.com/fairlead-io/fairlead/schemas/device"
)

// maxGap is how many registers (or, times 16, bits) nobody asked for are read
// along to save a request: 8 registers cost 16 bytes, a request a round trip.
const maxGap = 8

// block is what one request reads.
type block struct {
	table device.ModbusTable
	addr  uint16
	count uint16
	items []int // indices into the codecs that were planned
}

// manners is what a device has taught about merging, by property name.
type manners struct {
	alone map[string]bool // spoilt a merged read: always read by itself
	tight map[string]bool // a gap beside it spoilt one: merged without gaps only
}

func newManners() manners {
	return manners{alone: map[string]bool{}, tight: map[string]bool{}}
}

// plan groups codecs into as few requests as may be. Nil codecs are left out.
func plan(codecs []*codec, m manners) []block {
	var order []int
	for i, c := range codecs {
		if c != nil {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		x, y := codecs[a], codecs[b]
		return cmp.Or(cmp.Compare(x.table, y.table), cmp.Compare(x.addr, y.addr), cmp.Compare(x.count, y.count))
	})
	var out []block
	var last *block // the block that may grow
	var lastTight bool
	for _, i := range order {
		c := codecs[i]
		name := c.prop.Name
		if m.alone[name] {
			out = append(out, block{c.table, c.addr, c.count, []int{i}})
			last = nil
			continue
		}
		if last != nil && last.table == c.table {
			limit, gap := maxReadRegisters, maxGap
			if c.bits() {
				limit, gap = maxReadBits, 16*maxGap
			}
			if m.tight[name] || lastTight {
				gap = 0
			}
			end := int(last.addr) + int(last.count)
			newEnd := max(end, int(c.addr)+int(c.count))
			if int(c.addr)-end <= gap && newEnd-int(last.addr) <= limit {
				last.count = uint16(newEnd - int(last.addr))
				last.items = append(last.items, i)
				lastTight = m.tight[name]
				continue
			}
		}
		out = append(out, block{c.table, c.addr, c.count, []int{i}})
		last, lastTight = &out[len(out)-1], m.tight[name]
	}
	return out
}
