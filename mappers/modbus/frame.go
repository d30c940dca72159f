package modbus

import (
	"encoding/binary"
	"fmt"

	"github.com/goburrow/modbus"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

const (
	headerSize = 7   // transaction 2, protocol 2, length 2, unit 1
	maxADU     = 260 // header and a PDU of 253
	exception  = 0x80
)

// packager frames PDUs for one unit; it implements [modbus.Packager]. The line
// fills the transaction identifier in when it sends.
type packager struct{ unit byte }

// Encode puts the MBAP header before the PDU.
func (p packager) Encode(pdu *modbus.ProtocolDataUnit) ([]byte, error) {
	n := headerSize + 1 + len(pdu.Data)
	if n > maxADU {
		return nil, fmt.Errorf("request of %d bytes: want at most %d", n, maxADU)
	}
	adu := make([]byte, n)
	binary.BigEndian.PutUint16(adu[4:], uint16(2+len(pdu.Data)))
	adu[6], adu[7] = p.unit, pdu.FunctionCode
	copy(adu[headerSize+1:], pdu.Data)
	return adu, nil
}

// Decode takes the PDU out of a frame that Verify has passed.
func (packager) Decode(adu []byte) (*modbus.ProtocolDataUnit, error) {
	return &modbus.ProtocolDataUnit{FunctionCode: adu[headerSize], Data: adu[headerSize+1:]}, nil
}

// Verify checks a reply against its request, beyond what the line has checked.
func (packager) Verify(request, reply []byte) error { return verify(request, reply) }

func verify(request, reply []byte) error {
	if len(reply) < headerSize+2 {
		return malformed("reply of %d bytes is too short", len(reply))
	}
	if reply[6] != request[6] {
		return malformed("reply of unit %d to a request for unit %d", reply[6], request[6])
	}
	if fc := reply[7]; fc != request[7] && fc != request[7]|exception {
		return malformed("reply with function %d to a request with function %d", fc, request[7])
	}
	return nil
}

// malformed is the fault of a device that breaks the protocol.
func malformed(format string, args ...any) error {
	return &driver.Fault{Quality: payload.QualityDevice, Err: fmt.Errorf(format, args...)}
}
